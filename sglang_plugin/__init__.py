"""The SGLang plug-in; installs as `moe_a2a.sglang_plugin`.

Not part of this version: nothing here registers with SGLang, and no entry point is installed.
"""

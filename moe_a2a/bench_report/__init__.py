"""`moe-a2a bench-report`: tables of what SGLang's serving benchmark logged."""

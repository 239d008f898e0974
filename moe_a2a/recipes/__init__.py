"""Launch recipes for SGLang: from hosts and a model to commands that run. docs/recipes.md explains how to use them.

plan: what a recipe says, which renderers turn into files. hosts: what users write as HOST[:GPUS]. models: what is known
of a model, from models.json or a config.json. memory: what fits on a GPU. releases: how SGLang's releases differ.
servers: command lines of servers and of the router. pd, ep, epd: the recipes. quoting, shell, compose: files.
commands: `moe-a2a recipe`.
"""

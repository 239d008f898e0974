"""Launch recipes for SGLang: from hosts and a model to commands that run. docs/recipes.md explains how to use them.

plan: what a recipe says, which renderers turn into files. hosts: what users write as HOST[:GPUS]. models: what is known
of a model, from models.json or a config.json. memory: what fits on a GPU. releases: how SGLang's releases differ.
ports: who listens where. servers: command lines of servers and of the router. pd, ep, epd: the recipes; experts: the
rules of ep. text: the page that goes with them. quoting, shell, compose, write: files. commands: `moe-a2a recipe`.
"""

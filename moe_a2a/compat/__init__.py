"""Surfaces of other libraries over moe-a2a: a program written for one of them runs by changing its import."""

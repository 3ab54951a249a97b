"""Tool calls and reasoning in the text of a chat: how each family of templates writes them, how they are
read as they come, and the grammars that force them.

Imports nothing but `core.py`, so that whatever makes text can use it.
"""

"""Chat templates as programs: the Jinja environment, the processes that run it, and what a template makes of a message.

A template comes with the model and the messages come from clients, so neither is trusted with the caller's process: a
template is rendered in a process of its own that can be killed. Imports nothing but Jinja and nexusengine.errors, so
that such a process starts quickly and stays small.
"""

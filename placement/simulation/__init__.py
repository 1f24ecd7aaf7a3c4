"""Plays a deployment in virtual time, with the very code that serves live: replica core, routing and binding."""

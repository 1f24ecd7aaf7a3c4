"""Pure decisions: where weights go, where a request goes, which tokens go in a step.

Nothing here knows of torch, ray, grpc, sockets, clocks or threads, so a simulator and the live system run the
same code.
"""

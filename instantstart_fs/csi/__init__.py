"""The Container Storage Interface for Kubernetes: a node driver beside the daemon, which it asks by the control socket.

It needs grpcio and protobuf (`pip install 'instantstart-fs[csi]'`); nothing of the daemon imports it.
"""

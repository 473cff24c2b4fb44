"""Ray's replicas: on this machine or a cluster. The only room that names Ray."""

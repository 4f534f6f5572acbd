"""The edge service of one cluster: directory and bridge to its neighbours."""

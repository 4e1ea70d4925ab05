"""The repair of a qcow2 image: what a check finds, mended on a draft in memory and then written in phases."""

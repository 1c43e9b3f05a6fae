"""Models: loading a pair, finding its blocks, norms and head, and building a tiny one."""

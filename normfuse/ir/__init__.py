"""The graph that passes rewrite: constants, views on its nodes, conditions on calls, the finished module."""

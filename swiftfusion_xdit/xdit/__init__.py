"""The host side: everything that knows xfuser. Nothing else of the package imports it.

No module here imports xfuser while it is imported: the hooks run while xfuser is still loading,
and are given the modules that they change.
"""

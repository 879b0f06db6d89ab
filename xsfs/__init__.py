"""xsfs: Xenstore, the configuration store of the Xen hypervisor, as a file system."""

__version__ = "0.1.0"

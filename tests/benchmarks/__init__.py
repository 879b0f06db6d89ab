"""How fast xsfs is, as ratios to what its users have today: `python3 -m tests.benchmarks`.

Absolute times say more about the machine than about xsfs, so everything is measured against
something that does the same work on the same machine in the same second: the Xenstore tools, pyxs,
and a bare pyfuse3 file system, which is what FUSE itself costs from Python.

    works       what is measured, against what, and how fast it should be: one table
    timing      rounds in which every contender runs, so that noise hits all of them alike
    stores      real daemons with as many nodes as asked for
    mounting    file systems in processes of their own, and their certain end
    bare        the bare pyfuse3 file system
    report      the figures as a table, and as JSON
    everyday    five everyday jobs for the documents: a program of its own; chart draws its picture
    subtree     .ls and .json beside xenstore-ls: a program of its own
    against     this version against another one
    watches     how fast changes are told: a program of its own
"""

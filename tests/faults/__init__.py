"""Faults for a server under test, and what must be true in spite of them.

In the harness: `server` (start, kill, cut the power), `proxy` (the network), `learners` and `feeders` (clients that
stream), `audit` and `stored` (what the server has kept), `undisturbed` (what a learner must be).

In the server's processes, by way of site/sitecustomize.py: `injection` (kill points, see `points`), `sqlite_vfs` and
`disk` (what is on disk after a power loss), `storage` (a disk that is full, read-only or broken). `plan` is what both
sides share. The product knows nothing of any of this.
"""

"""What a call costs: `make bench`, or `python -m benchmarks --help`. `docs/performance.md` says how it is measured.

A mock upstream (`upstream`), a load generator (`load`), and between them one contestant after the other: nothing,
nginx, this gateway in several configurations (`contestants`), gateways of others (`peers`, from environments that
`installs` makes). `course` runs the same measurements for each, `kept` puts them beside those of earlier runs, and
`report` makes the page of `results/` from them. `soak` is the long run. All processes are on one machine, over
loopback. `history` is something else: look-ups in a large database, without a gateway around.

The figure that survives a noisy machine is CPU time per request, of all processes of the contestant, from /proc: this
runs on Linux only. It is a measurement, never a test: nothing fails because it is slow.
"""

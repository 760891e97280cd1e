"""Ends with 0 if the gateway in this container answers with 200: `healthcheck.py /health/ready`."""

import http.client
import os
import sys

connection = http.client.HTTPConnection("127.0.0.1", int(os.environ.get("GATEWAY_PORT") or 8000), timeout=5)
try:
    connection.request("GET", sys.argv[1])
    reply = connection.getresponse()
    print(reply.status, reply.read(1000).decode(errors="replace"))
    sys.exit(reply.status != 200)
except OSError as failure:
    sys.exit(f"no answer: {failure}")

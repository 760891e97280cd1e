"""gunicorn -c gunicorn.conf.py "gateway.app:create_app()"

Address, workers, drain and log come from config.yaml and the environment, as for `gateway serve`; what else gunicorn
can do is set below, or on its command line. docs/deployment.md says more.
"""

from gateway.gunicorn_config import configuration

globals().update(configuration())

# pidfile = "/run/gateway/gunicorn.pid"
# timeout = 30        # seconds that a worker's loop may be stuck; a stream may last as long as it does
# worker_tmp_dir = "/dev/shm"

"""These tests look at built packages: `make test-packages` runs them, `make test` does not."""
import os

collect_ignore_glob = [] if os.environ.get('XMSRV_PACKAGES') else ['test_*.py']

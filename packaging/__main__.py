"""The launcher, /usr/bin/x-msrv, runs this: /usr/share/x-msrv, first in Python's path even with -I, has the program;
the bundled libraries are in /usr/lib/x-msrv, found from here, so that the tree runs below any root."""
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(1, os.path.normpath(os.path.join(HERE, '../../lib/x-msrv')))

import xmsrv  # noqa: E402 - the libraries' place comes first

sys.exit(xmsrv.main())

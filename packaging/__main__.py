"""What the launcher, /usr/bin/x-msrv, runs: Python puts the directory of this file first in its path, even with -I."""
import sys

import xmsrv

sys.exit(xmsrv.main())

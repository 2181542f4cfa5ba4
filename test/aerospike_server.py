"""The stand-in for an Aerospike server, to run it alone, or to import it where only test/ is on the path.

    .venv/bin/python test/aerospike_server.py --port 3000

It is support/aerospike_server.py, beside the helpers that it shares with the tests; this is another name of it.
"""
import importlib
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent / 'support'))   # for what it imports itself
stand_in = importlib.import_module('support.aerospike_server')

if __name__ == '__main__':
    stand_in.main()
sys.modules[__name__] = stand_in

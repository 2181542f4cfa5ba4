"""How x-msrv is built: `make venv` and the packages call this. The version is the module's own."""
import os
import re

from setuptools import setup

HERE = os.path.dirname(os.path.abspath(__file__))
LEFTOVERS = 'build/setuptools'  # below build/, so that the tree stays as it was cloned

with open(os.path.join(HERE, 'xmsrv.py'), encoding='utf-8') as module:
    # Read, not imported: the module's own imports need not be there when it is built.
    VERSION = re.search(r"^__version__ = '([^']+)'", module.read(), re.MULTILINE).group(1)

os.makedirs(os.path.join(HERE, LEFTOVERS), exist_ok=True)  # egg_info makes no directory of its own

setup(
    name='x-msrv',
    version=VERSION,
    description='Stores JSON messages from an NSQ topic as records, none lost, none duplicated',
    license='MIT',
    py_modules=['xmsrv'],
    entry_points={'console_scripts': ['x-msrv = xmsrv:main']},
    python_requires='>=3.11',
    install_requires=[
        'aerospike>=19.3,<20',
        'pynsq>=0.9.1,<0.10',
        'tornado>=6.6.1,<6.7',
        'voluptuous>=0.16,<0.17',
        'configobj>=5.0.9,<6',
        'tqdm>=4.66,<5',
        'prometheus_client>=0.21,<1',
        'shtab>=1.13,<2',  # imported by `x-msrv completion` alone
    ],
    options={'build': {'build_base': LEFTOVERS}, 'egg_info': {'egg_base': LEFTOVERS}},
)

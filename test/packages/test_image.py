"""The container image, built by `make image` from a base made here, and run as containers are: process 1 of its own
namespace, a read-only root, a user that the image does not know. And the files that start it: Kubernetes, compose.
"""
import contextlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
from pathlib import Path

import guests
import pytest
from guests import GUESTS, run
from test_packages import VERSION

from servers import PROGRAM, ROOT, free_ports, spawn, wait_until

NEEDED = {'buildah': 'buildah', 'mmdebstrap': 'mmdebstrap', 'unshare': 'util-linux', 'nsenter': 'util-linux'}
MISSING = ' '.join(sorted({package for tool, package in NEEDED.items() if not shutil.which(tool)}))
pytestmark = pytest.mark.xdist_group('image')   # one worker builds it, once
needs_buildah = pytest.mark.skipif(bool(os.geteuid() or MISSING), reason=f'only root, apt-get install {MISSING}')
SCHEMAS = ROOT / 'build/schemas/bin'
MANIFESTS = sorted((ROOT / 'kubernetes').glob('*.yaml'))
COMPOSE = ROOT / 'test/compose.yaml'
STRANGER = '12345:0'    # a user of no name, in the group 0
CONFIGURATION, STATE = 'etc/x-msrv/x-msrv.conf', 'var/lib/x-msrv'
# As an engine starts a container: the root read-only, volumes bound over it, /proc of its own.
START = f'''set -e
root=$1 state=$2 file=$3 user=$4; shift 4
mount --bind "$root" "$root"
mount --bind "$state" "$root/{STATE}"
[ -z "$file" ] || mount --bind "$file" "$root/{CONFIGURATION}"
mount -t proc proc "$root/proc"
mount -o remount,bind,ro "$root"
exec chroot --userspec="$user" --groups= "$root" "$@"
'''


# ----------------------------------------------------------------------------------------------------------- the image

class Image:
    """What `make image` has built: its configuration, as an engine reads it, and its files."""

    def __init__(self, environment):
        self.environment = environment
        inspected = json.loads(self.buildah('inspect', '--type', 'image', f'x-msrv:{VERSION}'))
        self.config = inspected['Docker']['config']
        self.container = self.buildah('from', '--pull-never', f'x-msrv:{VERSION}').strip()
        self.root = Path(self.buildah('mount', self.container).strip())

    def buildah(self, *command):
        """What it prints."""
        return run('buildah', *command, env=self.environment, stderr=subprocess.DEVNULL)

    def command(self, *arguments, **environment):
        """Environment and command of a container, in the order of env(1)."""
        variables = [*self.config['Env'], *(f'{name}={value}' for name, value in environment.items())]
        return ['env', '-i', *variables, *self.config['Entrypoint'], *(arguments or self.config['Cmd'])]


@pytest.fixture(scope='module')
def image(tmp_path_factory, worker_id):
    """Built without a network or a registry; storage and runtime files are the test's own."""
    made = tmp_path_factory.mktemp('image')
    settings = made / 'storage.conf'
    storage = GUESTS / f'.storage-{worker_id}'
    settings.write_text(f'[storage]\ndriver = "vfs"\ngraphroot = "{storage}"\nrunroot = "{made}/run"\n')
    environment = {**os.environ, 'CONTAINERS_STORAGE_CONF': str(settings), 'STORAGE_DRIVER': 'vfs',
                   'BUILDAH_ISOLATION': 'chroot'}

    def buildah(*command):
        return run('buildah', *command, env=environment, stderr=subprocess.DEVNULL).strip()
    try:
        base = buildah('from', 'scratch')
        buildah('add', '--quiet', base, guests.root('slim'), '/')
        (made / 'none').touch()
        buildah('copy', '--quiet', base, made / 'none', '/etc/apt/sources.list')   # all is there: apt fetches nothing
        buildah('commit', '--quiet', '--rm', base, 'localhost/base:slim')
        run('make', '--silent', '--assume-old=deb', 'image', 'BUILDER=buildah', 'BASE=localhost/base:slim',
            cwd=ROOT, env=environment)
        yield Image(environment)
    finally:
        buildah('rm', '--all')
        buildah('rmi', '--all', '--force')
        shutil.rmtree(storage, ignore_errors=True)


class Container:
    """A process of an image: process 1 of its namespace; `state` is its volume."""

    def __init__(self, image, directory, *arguments, file='', user=STRANGER, **environment):
        self.image, self.state, self.output = image, directory / 'state', directory / 'output'
        self.state.mkdir(exist_ok=True)
        os.chown(self.state, *map(int, user.split(':')))
        with self.output.open('w') as output:
            self.process = spawn(['unshare', '--mount', '--pid', '--fork', '--kill-child', 'sh', '-c', START, 'sh',
                                  image.root, self.state, file, user, *image.command(*arguments, **environment)],
                                 stdout=output, stderr=subprocess.STDOUT)

    def pid(self):
        """Process 1 of the container, as this system counts; None until it runs the program."""
        children = Path(f'/proc/{self.process.pid}/task/{self.process.pid}/children').read_text().split()
        with contextlib.suppress(FileNotFoundError):
            if children and '/usr/share/x-msrv' in Path(f'/proc/{children[0]}/cmdline').read_text():
                return int(children[0])
        return None

    def healthcheck(self, listen):
        """The exit status of the image's own check, of a daemon that listens there."""
        kind, *command = self.image.config['Healthcheck']['Test']
        assert kind == 'CMD'
        environment = [*self.image.config['Env'], f'XMSRV__METRICS__LISTEN={listen}']
        return subprocess.run(['nsenter', '-t', str(self.pid()), '--mount', '--pid', '--root', '--wd=/', 'env', '-i',
                               *environment, *command], check=False).returncode

    def wait(self):
        """Its exit status; what it said."""
        status = self.process.wait(timeout=60)
        return status, self.output.read_text()


def records(container):
    """How many records the volume has."""
    with contextlib.closing(sqlite3.connect(container.state / 'records.sqlite')) as database:
        return database.execute('SELECT count(*) FROM records').fetchone()[0]


@needs_buildah
def test_the_image_runs_a_window_as_any_user_with_a_read_only_root(image, nsqd, tmp_path):
    """Configured by the environment alone; the log is JSON, one object a line."""
    nsqd.publish('orders', [f'{{"id": {each}}}' for each in range(5)])
    container = Container(image, tmp_path, 'once', XMSRV__STORE='sqlite', XMSRV__NSQ__NSQD_TCP_ADDRESS=nsqd.tcp,
                          XMSRV__NSQ__TOPIC='orders', XMSRV__NSQ__MAX_MESSAGES=3)
    status, said = container.wait()
    assert status == 0, said
    summary = [json.loads(line) for line in said.splitlines()][-1]
    assert (summary['received'], summary['stored'], summary['topic']) == (3, 3, 'orders')
    assert records(container) == 3
    assert {path.stat().st_uid for path in container.state.iterdir()} == {12345}


@needs_buildah
def test_the_daemon_of_the_image_is_process_1_and_ends_on_sigterm(image, nsqd, tmp_path):
    """It is healthy before that, by the image's own check; its configuration is a file that is mounted."""
    file = tmp_path / 'x-msrv.conf'
    file.write_text(f'store = sqlite\nperiod = 1s\n[nsq]\nnsqd-tcp-address = {nsqd.tcp}\ntopic = orders\n')
    nsqd.publish('orders', ['{"id": 1}', '{"id": 2}'])
    port = free_ports()
    container = Container(image, tmp_path, file=file, XMSRV__METRICS__LISTEN=f'0.0.0.0:{port}')
    pid = wait_until(container.pid, 'the program is process 1')
    wait_until(lambda: nsqd.left('orders', 'x-msrv') == 0,
               'both messages are settled')
    wait_until(lambda: container.healthcheck(f'0.0.0.0:{port}') == 0, 'it is healthy')
    assert container.healthcheck('0.0.0.0:1') == 1   # nothing answers there
    assert re.search(r'^NSpid:.*\t1$', Path(f'/proc/{pid}/status').read_text(), re.MULTILINE)
    os.kill(pid, signal.SIGTERM)
    status, said = container.wait()
    assert (status, records(container)) == (0, 2), said


@needs_buildah
def test_a_fault_of_the_environment_ends_the_container_with_its_reason(image, tmp_path):
    """78, and the line names the variable's option."""
    status, said = Container(image, tmp_path, XMSRV__NSQ__MAX_MASSAGES='1').wait()
    assert status == os.EX_CONFIG and 'max-messages' in said.lower().replace('_', '-'), said


@needs_buildah
def test_the_image_is_for_any_user_but_root(image):
    """Numbers, for runAsNonRoot; what the group 0 may write, and nothing that only one user may read."""
    user, group = map(int, image.config['User'].split(':'))
    state, file = (image.root / STATE).stat(), (image.root / CONFIGURATION).stat()
    assert 0 not in (user, group)
    assert (state.st_uid, state.st_gid, state.st_mode & 0o7777) == (user, 0, 0o770)
    assert file.st_mode & 0o777 == 0o644
    assert image.config['Cmd'] == ['daemon'] and not image.config.get('StopSignal')
    assert f'/{STATE}' in image.config['Volumes']


@needs_buildah
def test_the_image_holds_neither_lists_of_apt_nor_an_init(image):
    """What an update would only make stale, and what a container does not run."""
    assert not list((image.root / 'var/lib/apt/lists').glob('*_*'))
    assert not (image.root / 'lib/systemd/systemd').exists()


# ------------------------------------------------------------------------------------------------ what starts the image

def documents(path):
    """The documents of a YAML file."""
    code = 'import json, sys, yaml; print(json.dumps(list(yaml.safe_load_all(open(sys.argv[1])))))'
    return json.loads(run(SCHEMAS / 'python', '-c', code, path))


def check(path, environment):
    """`x-msrv check` of a file, with the variables of a container."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith('XMSRV__')}
    ran = subprocess.run([PROGRAM, '-c', path, 'check'], env=inherited | environment, capture_output=True, text=True,
                         check=False)
    return ran.returncode, ran.stdout + ran.stderr


def pod(documents_):
    """The pod's spec of a Deployment or a CronJob, and the file of its ConfigMap."""
    configuration, workload = documents_
    spec = workload['spec']
    spec = spec.get('jobTemplate', {}).get('spec', spec)['template']['spec']
    assert spec['volumes'][0]['configMap']['name'] == configuration['metadata']['name']
    return spec, configuration['data']['x-msrv.conf']


@pytest.mark.parametrize('path', MANIFESTS, ids=lambda path: path.name)
def test_kubernetes_takes_the_manifests(path):
    """By its own schemas; a field that it does not know is an error."""
    run(SCHEMAS / 'kubernetes-validate', '--strict', '--quiet', path)


@pytest.mark.parametrize('path', MANIFESTS, ids=lambda path: path.name)
def test_the_manifests_fit_the_program_and_the_image(path, tmp_path):
    """The file and the variables are without fault; user, mounts and probes are what the image needs."""
    spec, text = pod(documents(path))
    container, = spec['containers']
    (tmp_path / 'x-msrv.conf').write_text(text)
    status, said = check(tmp_path / 'x-msrv.conf', {each['name']: each['value'] for each in container.get('env', [])}
                         | {'XMSRV__STATE_DIR': str(tmp_path)})
    assert status == 0, said
    assert spec['securityContext']['runAsNonRoot'] and container['securityContext']['readOnlyRootFilesystem']
    mounts = {each['mountPath']: each['name'] for each in container['volumeMounts']}
    assert mounts == {'/etc/x-msrv': 'configuration', f'/{STATE}': 'state'}
    ports = {f':{each["containerPort"]}' for each in container.get('ports', [])}
    listen = re.search(r'XMSRV__METRICS__LISTEN=\S+(:\d+)', (ROOT / 'Containerfile').read_text())[1]
    assert ports <= {listen} and bool(ports) == ('livenessProbe' in container)


def test_compose_starts_the_whole_pipeline(tmp_path):
    """By the schema of compose files; what x-msrv gets there is without fault, and names the other services."""
    run(SCHEMAS / 'check-jsonschema', '--builtin-schema', 'vendor.compose-spec', COMPOSE)
    services = documents(COMPOSE)[0]['services']
    mine = services['x-msrv']
    source, target, _ = mine['volumes'][0].split(':')
    assert target == f'/{CONFIGURATION}' and mine['read_only']
    status, said = check(COMPOSE.parent / source, mine['environment'] | {'XMSRV__STATE_DIR': str(tmp_path)})
    assert status == 0, said
    hosts = {value.split(':')[0] for name, value in mine['environment'].items() if name.endswith(('ADDRESS', 'HOSTS'))}
    assert hosts == {'nsqd', 'aerospike'} <= set(services)

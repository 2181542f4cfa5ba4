"""What the daemon answers by HTTP, at a port of this host."""
import urllib.error
import urllib.request


def get(port, path):
    """(status, text) of an answer; (0, '') when nobody listens, or ceases to meanwhile."""
    try:
        with urllib.request.urlopen(f'http://127.0.0.1:{port}{path}', timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except (urllib.error.URLError, ConnectionError):
        return 0, ''


def figure(port, name):
    """The value of a series in /metrics, or None."""
    lines = [line.rpartition(' ') for line in get(port, '/metrics')[1].splitlines() if not line.startswith('#')]
    return next((float(value) for series, _, value in lines if series == name), None)

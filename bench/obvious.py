"""The obvious version, for comparison: pynsq's Reader, whose handler stores each message as it comes.

Usage: obvious.py HOST:PORT TOPIC STORE COUNT. STORE is the file of an SQLite database (an insert a message, a commit
every hundred, table and durability as x-msrv's) or aerospike:HOST:PORT:NAMESPACE:SET (one put a message). It has none
of the guarantees: it finishes messages before they are committed, keys them by the id alone and checks nothing but that
they are JSON.
"""
import json
import sqlite3
import sys

import nsq
from tornado.ioloop import IOLoop

COMMIT_EVERY = 100
MAX_IN_FLIGHT = 2500  # as x-msrv to SQLite


def sqlite_store(database, topic, count):
    """A function that stores a message in an SQLite file."""
    db = sqlite3.connect(database)
    db.execute('PRAGMA journal_mode = WAL')
    db.execute('PRAGMA synchronous = FULL')
    db.execute('CREATE TABLE records ("set" TEXT, "key" TEXT, bins TEXT, stored_at TEXT, PRIMARY KEY ("set", "key"))')
    done = 0

    def store(key, bins):
        nonlocal done
        db.execute("INSERT OR REPLACE INTO records VALUES (?, ?, ?, datetime('now'))", (topic, key, json.dumps(bins)))
        done += 1
        if done % COMMIT_EVERY == 0 or done == count:
            db.commit()
    return store


def aerospike_store(place):
    """A function that stores a message in a set."""
    import aerospike
    _, host, port, namespace, where = place.split(':')
    client = aerospike.client({'hosts': [(host, int(port))]})
    return lambda key, bins: client.put((namespace, where, key), bins)


def main(address, topic, place, count):
    store = aerospike_store(place) if place.startswith('aerospike:') else sqlite_store(place, topic, count)
    left = count

    def handle(message):
        nonlocal left
        store(message.id.decode(), json.loads(message.body))
        left -= 1
        if not left:
            IOLoop.current().call_later(0.05, IOLoop.current().stop)  # for the last FINs
        return True

    nsq.Reader(message_handler=handle, nsqd_tcp_addresses=[address], topic=topic, channel='obvious',
               max_in_flight=MAX_IN_FLIGHT)
    IOLoop.current().start()


if __name__ == '__main__':
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))

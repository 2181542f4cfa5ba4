"""The obvious version, for comparison: pynsq's Reader, one insert a message, a commit every hundred.

Usage: obvious.py HOST:PORT TOPIC DATABASE COUNT. Same table and durability as x-msrv's, none of its guarantees: it
finishes messages before they are committed, keys them by the id alone and checks nothing but that they are JSON.
"""
import json
import sqlite3
import sys

import nsq
from tornado.ioloop import IOLoop

COMMIT_EVERY = 100
MAX_IN_FLIGHT = 2500  # as x-msrv


def main(address, topic, database, count):
    db = sqlite3.connect(database)
    db.execute('PRAGMA journal_mode = WAL')
    db.execute('PRAGMA synchronous = FULL')
    db.execute('CREATE TABLE records ("set" TEXT, "key" TEXT, bins TEXT, stored_at TEXT, PRIMARY KEY ("set", "key"))')
    done = 0

    def handle(message):
        nonlocal done
        bins = json.loads(message.body)
        db.execute("INSERT OR REPLACE INTO records VALUES (?, ?, ?, datetime('now'))",
                   (topic, message.id.decode(), json.dumps(bins)))
        done += 1
        if done % COMMIT_EVERY == 0 or done == count:
            db.commit()
        if done == count:
            IOLoop.current().call_later(0.05, IOLoop.current().stop)  # for the last FINs
        return True

    nsq.Reader(message_handler=handle, nsqd_tcp_addresses=[address], topic=topic, channel='obvious',
               max_in_flight=MAX_IN_FLIGHT)
    IOLoop.current().start()


if __name__ == '__main__':
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))

"""The bare Aerospike client, for comparison: batch_write of 500 records that are ready made, nothing else.

Usage: bare.py HOST:PORT NAMESPACE SET COUNT. Prints the seconds and the CPU seconds of the writing alone: no queue, no
JSON, no key to make, so nothing that stores messages by this client in one thread can be faster.
"""
import sys
import time

import aerospike
from aerospike_helpers.batch.records import BatchRecords, Write

BATCH = 500


def records(namespace, where, count):
    """Records of the size of those that bench.py's messages become."""
    for number in range(count):
        key = f'{number:016x}-18eae15d30b97daa-c1609f13'
        bins = {'id': number, 'msg': f'Some message-{number}', 'price': 0.25,
                'ext': [{'ext1': 'xxx'}, {'ext2': 42}], 'gid': key}
        ops = [{'op': aerospike.OPERATOR_WRITE, 'bin': name, 'val': value} for name, value in bins.items()]
        yield Write((namespace, where, key), ops)


def main(address, namespace, where, count):
    host, _, port = address.rpartition(':')
    policy = {'key': aerospike.POLICY_KEY_SEND, 'exists': aerospike.POLICY_EXISTS_CREATE_OR_REPLACE}
    client = aerospike.client({'hosts': [(host, int(port))], 'policies': {'batch_write': policy}})
    ready = list(records(namespace, where, count))
    begun, cpu_begun = time.monotonic(), time.process_time()
    for first in range(0, count, BATCH):
        batch = client.batch_write(BatchRecords(ready[first:first + BATCH]))
        if batch.result or any(record.result for record in batch.batch_records):
            sys.exit(f'bare.py: the call was answered with {batch.result}')
    print(time.monotonic() - begun, time.process_time() - cpu_begun)
    client.close()


if __name__ == '__main__':
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))

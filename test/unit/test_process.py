"""What the process itself is told before it begins."""
import resource
import threading

import xmsrv


def page_faults(work):
    """The page faults of a thread that does `work` a hundred times, the first time aside."""
    def measure():
        work()
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        for _ in range(100):
            work()
        found.append(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before)
    found = []
    thread = threading.Thread(target=measure)
    thread.start()
    thread.join()
    return found[0]


def test_what_a_batch_frees_is_kept_for_the_next():
    xmsrv.keep_freed_memory()
    # 2 MiB in blocks of a size that glibc, left to itself, returns to the kernel when they are freed: 51,200 pages
    assert page_faults(lambda: [bytes(100_000) for _ in range(20)]) < 1000
    # and blocks for which it would ask the kernel one by one
    assert page_faults(lambda: [bytes(1_000_000) for _ in range(2)]) < 1000

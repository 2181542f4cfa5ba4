"""The consumer: credit and time in, commands for nsqd out. Its connections are real, their streams are the test's."""
import asyncio
import logging

import nsq
import pytest
from tornado.iostream import StreamClosedError

import clock
import fakes
import xmsrv
from xmsrv import (
    HEARTBEAT_INTERVAL,
    RDY_TRANSIT,
    BackgroundTasks,
    ConnectionOptions,
    Consumer,
    Health,
    NsqdError,
    Subscription,
    Unavailable,
)


def connect(consumer, port=4150):
    """A connection that is up, with a stream that only notes what is sent."""
    connection = Subscription(('127.0.0.1', port), consumer)
    connection.stream = fakes.Stream()
    connection.max_rdy, connection.msg_timeout, connection.max_msg_timeout, connection.idle_delay = (
        2500, 60.0, 900.0, 0.05)
    connection.last_read = asyncio.get_running_loop().time()
    consumer.addresses.append(connection.address)
    consumer.connect_errors[connection.address] = None
    consumer.connections.append(connection)
    return connection


class Window:
    """What a window is to a consumer: a credit, and the messages that it accepted."""

    def __init__(self, credit):
        self.messages_left, self.accepted = credit, []

    def credit(self):
        return self.messages_left

    def accept(self, messages):
        self.accepted += messages
        self.messages_left -= len(messages)


def with_consumer(steps, connections=1, credit=100, **nsq_options):
    """Runs `steps(consumer, window, *connections)`, with a window of so much credit."""
    async def main():
        config = fakes.options(nsq=nsq_options)
        tasks, window = BackgroundTasks(), Window(credit)
        consumer = Consumer(config, tasks, ConnectionOptions(config), 'orders', 'x-msrv', Health())
        up = [connect(consumer, 4150 + place) for place in range(connections)]
        consumer.start(window.credit, window.accept)
        consumer.on_credit_change()
        await steps(consumer, window, *up)
        await tasks.cancel()
    clock.run(main())


def come(connection, *numbers, **more):
    """Messages come on a connection."""
    connection.last_read = asyncio.get_running_loop().time()
    messages = [fakes.message(n, conn=connection, now=connection.last_read, **more) for n in numbers]
    connection.deliver(messages)
    return messages


def taken(connection):
    """The commands that were sent since this was asked last."""
    sent, connection.stream.sent = connection.stream.sent, []
    return sent


def test_what_comes_near_the_end_is_taken_off_rdy_before_any_fin():
    async def steps(consumer, window, connection):
        assert taken(connection) == ['RDY 5']
        first, *_ = come(connection, 1, 2, 3)
        assert taken(connection) == ['RDY 2']
        consumer.finish([first])
        assert taken(connection) == ['FIN 0000000000000001']
        come(connection, 4, 5)
        assert taken(connection) == ['RDY 0']
    with_consumer(steps, credit=5)


def test_rdy_is_shared_and_never_over_max_in_flight():
    async def steps(consumer, window, one, two):
        assert (taken(one), taken(two)) == (['RDY 5'], ['RDY 5'])
    with_consumer(steps, connections=2, credit=100, **{'max-in-flight': '10'})


def test_rdy_counts_bytes_and_is_0_at_max_held():
    async def steps(consumer, window, connection):
        come(connection, 1, body=b'x' * 600)
        assert taken(connection)[-1] == 'RDY 2'    # the one in flight, and room for one more
        second, = come(connection, 2, body=b'x' * 600)
        assert taken(connection) == ['RDY 0']
        consumer.finish([second])
        consumer.on_credit_change()
        assert taken(connection) == ['FIN 0000000000000002', 'RDY 2']
    with_consumer(steps, **{'max-held': '1000'})


def test_at_max_held_no_other_nsqd_may_send_either_and_that_at_once():
    async def steps(consumer, window, one, two):
        consumer.in_flight_bytes.expected_size = 100
        consumer.on_credit_change()
        assert (one.rdy, two.rdy) == (5, 5)
        come(one, 1, body=b'x' * 1000)
        assert (taken(one)[-1], taken(two)[-1], consumer.rdy_budget) == ('RDY 0', 'RDY 0', 0)
    with_consumer(steps, connections=2, **{'max-held': '1000'})


def test_at_the_end_of_the_credit_no_other_nsqd_may_send_either():
    async def steps(consumer, window, one, two):
        consumer.in_flight_bytes.expected_size = 1
        come(one, *range(10))    # more than its RDY: they crossed a lower one
        assert (window.messages_left, one.rdy, two.rdy) == (0, 0, 0)
    with_consumer(steps, connections=2, credit=10)


def test_what_comes_shows_that_the_nsqd_is_not_idle():
    async def steps(consumer, window, connection):
        consumer.mark_idle(asyncio.get_running_loop().time() + 1)
        assert (connection.idle, connection.found_idle, consumer.idle_since) == (True, True, 1001.0)
        come(connection, 1)
        assert (connection.idle, connection.found_idle, consumer.idle_since) == (False, False, None)
    with_consumer(steps)


def test_after_the_end_of_a_window_rdy_is_0_and_nothing_goes_to_it():
    async def steps(consumer, window, connection):
        consumer.stop()
        assert taken(connection) == ['RDY 100', 'RDY 0']
        come(connection, 1)
        assert (window.accepted, list(consumer.in_flight.values())[0].id) == ([], b'0000000000000001')
    with_consumer(steps)


def test_the_next_window_begins_with_its_own_credit_and_counts():
    async def steps(consumer, window, connection):
        consumer.requeue(come(connection, 1, 2))
        consumer.late, consumer.idle_since, connection.idle, connection.found_idle = 3, 1.0, True, True
        consumer.stop()
        after = Window(7)
        consumer.start(after.credit, after.accept)
        consumer.on_credit_change()
        assert taken(connection)[-2:] == ['RDY 0', 'RDY 7']
        assert (consumer.requeued, consumer.late, consumer.idle_since) == (0, 0, None)
        assert (connection.idle, connection.found_idle) == (False, False)
        come(connection, 3)
        assert (len(window.accepted), len(after.accepted)) == (2, 1)
    with_consumer(steps)


def test_each_message_is_answered_once_and_a_delay_is_in_milliseconds():
    async def steps(consumer, window, connection):
        messages = come(connection, 1, 2)
        taken(connection)
        consumer.requeue(messages[:1], 2)
        consumer.finish(messages)
        consumer.finish(messages)
        assert taken(connection) == ['REQ 0000000000000001 2000', 'FIN 0000000000000002']
        assert (consumer.requeued, consumer.late, consumer.in_flight_bytes.total, connection.in_flight) == (1, 0, 0, 0)
    with_consumer(steps)


def test_an_answer_for_a_connection_that_is_gone_is_late():
    async def steps(consumer, window, one, two):
        messages = [*come(one, 1, 2), *come(two, 3)]
        taken(two)
        one.close_socket()
        consumer.requeue(messages)
        assert (consumer.late, consumer.requeued, taken(two)) == (2, 1, ['REQ 0000000000000003 0'])
    with_consumer(steps, connections=2)


def test_an_answer_that_finds_out_that_its_connection_is_gone_is_late_too():
    async def steps(consumer, window, connection):
        messages = come(connection, 1, 2)

        def closed(data):
            raise StreamClosedError
        connection.stream.write = closed
        consumer.finish(messages)
        assert (consumer.late, connection.is_closed, consumer.in_flight) == (2, True, {})
    with_consumer(steps)


@pytest.mark.parametrize(('answer', 'late', 'requeued'), [
    (b'E_FIN_FAILED FIN x failed', 1, 1), (b'E_REQ_FAILED REQ x failed', 1, 0),
    (b'E_TOUCH_FAILED TOUCH x failed', 0, 1)])
def test_a_refused_answer_is_late_and_no_error(caplog, answer, late, requeued):
    async def steps(consumer, window, connection):
        consumer.requeue(come(connection, 1))
        connection.on_response(nsq.FRAME_TYPE_ERROR, answer)
        assert (consumer.late, consumer.requeued) == (late, requeued)
        assert caplog.messages[-1].endswith(f' late: {answer.split()[0].decode()}')
        with pytest.raises(NsqdError, match='E_INVALID'):
            connection.on_response(nsq.FRAME_TYPE_ERROR, b'E_INVALID what')
    with_consumer(steps)


def test_a_second_copy_joins_the_first_and_the_answer_goes_to_where_it_came_from_last():
    async def steps(consumer, window, one, two):
        first, = come(one, 1)
        await asyncio.sleep(3)
        come(two, 1, attempts=2)
        assert window.accepted == [first]
        assert (one.in_flight, two.in_flight, first.touched_at, first.received_at) == (0, 1, 1003.0, 1003.0)
        assert first.attempts == 2
        taken(one), taken(two)
        consumer.finish([first])
        assert (taken(one), taken(two)) == ([], ['FIN 0000000000000001'])
    with_consumer(steps, connections=2)


def test_what_is_set_aside_stays_in_flight_and_rdy_is_raised_by_it():
    async def steps(consumer, window, connection):
        messages = come(connection, 1, 2)
        consumer.set_aside(messages)
        consumer.set_aside(messages)   # it counts once
        consumer.on_credit_change()
        assert (connection.set_aside, taken(connection)[-1], len(consumer.in_flight)) == (2, 'RDY 10', 2)
        consumer.requeue(messages)
        assert connection.set_aside == 0
    with_consumer(steps, **{'max-in-flight': '10'})


def test_what_was_set_aside_in_one_window_counts_for_the_credit_of_the_next():
    async def steps(consumer, window, connection):
        messages = come(connection, 1, 2)
        consumer.set_aside(messages)
        consumer.stop()
        after = Window(10)
        consumer.start(after.credit, after.accept)
        consumer.on_credit_change()
        assert (connection.set_aside, taken(connection)[-1]) == (0, 'RDY 10')
        consumer.finish(messages)
        assert connection.set_aside == 0
    with_consumer(steps)


def test_touch_goes_at_half_of_msg_timeout_until_max_msg_timeout():
    async def steps(consumer, window, connection):
        connection.msg_timeout, connection.max_msg_timeout = 10.0, 31.0
        begun = asyncio.get_running_loop().time()
        come(connection, 1)
        taken(connection)
        task = consumer.tasks.start(consumer.run_ticks())
        times = []
        while asyncio.get_running_loop().time() < begun + 60:
            await asyncio.sleep(0.25)
            times += [asyncio.get_running_loop().time() - begun for command in taken(connection) if 'TOUCH' in command]
        assert len(times) == 6
        assert all(5 * n - 0.1 <= at <= 5 * n + 1.6 * n for n, at in enumerate(times, 1)), times
        task.cancel()
    with_consumer(steps)


def test_touch_goes_on_between_windows_too():
    async def steps(consumer, window, connection):
        connection.msg_timeout = 4.0
        come(connection, 1)
        consumer.stop()
        taken(connection)
        consumer.tasks.start(consumer.run_ticks())
        await asyncio.sleep(3)
        assert taken(connection) == ['TOUCH 0000000000000001']
    with_consumer(steps)


def test_touch_begins_with_what_crosses_the_end_of_a_window():
    async def steps(consumer, window, connection):
        connection.msg_timeout = 4.0
        consumer.stop()
        consumer.tasks.start(consumer.run_ticks())
        await asyncio.sleep(100)       # nothing is in flight: it sleeps
        come(connection, 1)
        taken(connection)
        await asyncio.sleep(3)
        assert taken(connection) == ['TOUCH 0000000000000001']
    with_consumer(steps)


def test_rdy_by_bytes_counts_what_is_in_flight_and_not_set_aside():
    async def steps(consumer, window, connection):
        consumer.in_flight_bytes.expected_size = 100
        messages = come(connection, *range(4), body=b'x' * 100)
        assert (consumer.in_flight_bytes.free_slots, consumer.rdy_budget) == (6, 10)
        consumer.set_aside(messages[:3])
        assert consumer.rdy_budget == 7
    with_consumer(steps, credit=1000, **{'max-held': '1000'})


def test_the_queue_is_idle_once_each_nsqd_could_deliver_for_a_while_and_did_not():
    async def steps(consumer, window, one, two):
        loop = asyncio.get_running_loop()
        one.round_trip = 0.3
        consumer.mark_idle(loop.time() + 0.1)
        # one answer is still on its way
        assert (one.found_idle, two.found_idle, consumer.idle_since) == (False, True, None)
        consumer.mark_idle(loop.time() + 0.4)
        assert (one.found_idle, two.found_idle, consumer.idle_since) == (True, True, loop.time() + 0.4)
        consumer.mark_idle(loop.time() + 0.5)
        assert consumer.idle_since == loop.time() + 0.4
        one.last_data = loop.time() + 0.5    # a part of a message
        consumer.mark_idle(loop.time() + 0.51)
        assert (one.idle, consumer.idle_since) == (False, None)
        window.messages_left = 0
        consumer.mark_idle(loop.time() + 5)
        assert consumer.idle_since is None   # nothing may come, so nothing is said of the queue
    with_consumer(steps, connections=2)


def test_an_nsqd_that_may_not_send_is_not_idle():
    async def steps(consumer, window, connection):
        messages = come(connection, *range(10))        # all of its RDY is in flight
        consumer.mark_idle(asyncio.get_running_loop().time() + 5)
        assert (connection.idle, connection.rdy_since) == (False, 1005.0)
        consumer.finish(messages)
        consumer.mark_idle(1005.01)
        assert not connection.idle                     # only since then could it
        consumer.mark_idle(1005.1)
        assert connection.idle
    with_consumer(steps, **{'max-in-flight': '10'})


def test_an_idle_nsqd_is_found_by_the_tick_and_its_rdy_goes_to_the_others():
    async def steps(consumer, window, one, two):
        consumer.tasks.start(consumer.run_ticks())
        for n in range(20):
            consumer.finish(come(one, n))
            await asyncio.sleep(0.02)
        assert (one.rdy, two.rdy, consumer.idle_since) == (9, 1, None)
        await asyncio.sleep(0.2)
        assert consumer.idle_since
    with_consumer(steps, connections=2, credit=1000, **{'max-in-flight': '10'})


async def near_the_end(consumer, one, two):
    """Of 20 messages that may come, `one` has sent its 10, and `two` has been silent for long enough to be idle."""
    assert (one.rdy, two.rdy) == (10, 10)
    consumer.tasks.start(consumer.run_ticks())
    consumer.finish(come(one, *range(10)))
    while two.rdy == 10:
        await asyncio.sleep(0.001)
    assert (two.idle, one.rdy, two.rdy) == (True, 0, 1)


def test_rdy_goes_to_another_nsqd_only_when_the_first_has_heard_that_it_lost_it():
    """An nsqd that is slow and one that is idle look the same: what a slow one sends still fits into the window."""
    async def steps(consumer, window, one, two):
        await near_the_end(consumer, one, two)
        await asyncio.sleep(RDY_TRANSIT * 0.9)
        assert (one.rdy, two.rdy) == (0, 1)
        consumer.finish(come(two, *range(10, 19)))   # it had not heard yet
        await asyncio.sleep(0.02)
        assert (window.messages_left, one.rdy + two.rdy) == (1, 1)
    with_consumer(steps, connections=2, credit=20)


def test_an_nsqd_that_stays_silent_loses_its_rdy_soon():
    async def steps(consumer, window, one, two):
        await near_the_end(consumer, one, two)
        lowered_at = asyncio.get_running_loop().time()
        while one.rdy < 9:
            await asyncio.sleep(0.001)
        assert RDY_TRANSIT <= asyncio.get_running_loop().time() - lowered_at < RDY_TRANSIT + 0.06 and two.rdy == 1
        consumer.finish(come(one, *range(20, 29)))
        assert window.messages_left == 1 and one.rdy + two.rdy <= 1
        await asyncio.sleep(0.4)
        assert one.rdy + two.rdy == 1
    with_consumer(steps, connections=2, credit=20)


def test_a_far_nsqd_hears_later():
    async def steps(consumer, window, one, two):
        two.round_trip = 0.5
        await asyncio.sleep(0.5)
        await near_the_end(consumer, one, two)
        await asyncio.sleep(0.5)
        assert one.rdy == 0
        await asyncio.sleep(RDY_TRANSIT + 0.05)
        assert one.rdy > 0
    with_consumer(steps, connections=2, credit=20)


def test_what_an_nsqd_has_not_heard_yet_holds_up_nobody_while_there_is_plenty():
    async def steps(consumer, window, one, two):
        consumer.tasks.start(consumer.run_ticks())
        for n in range(6):
            consumer.finish(come(one, n))
            await asyncio.sleep(0.02)
        assert (one.rdy, two.rdy) == (9, 1)
    with_consumer(steps, connections=2, credit=25, **{'max-in-flight': '10'})


def test_an_nsqd_gets_back_at_once_what_it_may_not_have_heard_that_it_lost():
    async def steps(consumer, window, one, two):
        await near_the_end(consumer, one, two)
        consumer.finish(come(two, 10))
        consumer.on_credit_change()
        assert (window.messages_left, one.rdy, two.rdy, two.rdy_overhang) == (9, 0, 5, 4)
    with_consumer(steps, connections=2, credit=20)


def test_touch_follows_the_shortest_msg_timeout_of_all():
    async def steps(consumer, window, one, two):
        one.msg_timeout, two.msg_timeout = 100.0, 4.0
        come(one, 1), come(two, 2)
        taken(one), taken(two)
        consumer.tasks.start(consumer.run_ticks())
        await asyncio.sleep(8)
        assert [command for command in taken(one) if 'TOUCH' in command] == []
        assert [command for command in taken(two) if 'TOUCH' in command] == ['TOUCH 0000000000000002'] * 3
    with_consumer(steps, connections=2)


def test_a_heartbeat_is_answered_between_messages_and_while_no_window_takes_any():
    async def steps(consumer, window, connection):
        consumer.stop()
        taken(connection)
        reading = asyncio.ensure_future(connection.read_messages())
        heartbeat = fakes.frame(nsq.FRAME_TYPE_RESPONSE, b'_heartbeat_')
        connection.stream.feed(heartbeat + fakes.message_frame(b'%016d' % 1) + heartbeat)
        await asyncio.sleep(1)
        assert taken(connection) == ['NOP', 'NOP']
        assert [message.id for message in consumer.in_flight.values()] == [b'%016d' % 1]
        reading.cancel()
    with_consumer(steps)


def test_an_nsqd_that_has_not_received_rdy_0_yet_fills_no_memory():
    """From twice max-held on it is read slowly, its heartbeat behind the messages in time; with room again at once."""
    async def steps(consumer, window, connection):
        reading = asyncio.ensure_future(connection.read_messages())
        for n in range(100):
            connection.stream.feed(fakes.message_frame(b'%016d' % n, b'x' * 102400))
        connection.stream.feed(fakes.frame(nsq.FRAME_TYPE_RESPONSE, b'_heartbeat_'))
        await asyncio.sleep(10 * RDY_TRANSIT)
        assert 20 < len(window.accepted) < 35 and taken(connection)[-1] == 'RDY 0'
        await asyncio.sleep(HEARTBEAT_INTERVAL)
        assert len(window.accepted) == 100 and taken(connection) == ['NOP']
        consumer.finish(window.accepted[:])
        await asyncio.sleep(RDY_TRANSIT)
        for n in range(100, 115):
            connection.stream.feed(fakes.message_frame(b'%016d' % n, b'x' * 102400))
        await asyncio.sleep(0)
        await asyncio.sleep(RDY_TRANSIT / 10)
        assert len(window.accepted) == 115
        reading.cancel()
    with_consumer(steps, credit=1000, **{'max-held': '1MiB'})


def test_a_silent_nsqd_is_given_up_after_two_heartbeats_and_a_second():
    async def steps(consumer, window, connection):
        begun = asyncio.get_running_loop().time()
        reading = asyncio.ensure_future(connection.read_messages())
        await asyncio.sleep(15)
        connection.stream.feed(fakes.frame(nsq.FRAME_TYPE_RESPONSE, b'_heartbeat_'))
        with pytest.raises(NsqdError, match='no heartbeat for 21 s'):
            await asyncio.wait_for(reading, 100)
        assert asyncio.get_running_loop().time() - begun == pytest.approx(36)
    with_consumer(steps)


def test_a_frame_in_pieces_is_read_whole_and_its_parts_are_activity():
    async def steps(consumer, window, connection):
        reading = asyncio.ensure_future(connection.read_messages())
        data = fakes.message_frame(b'%016d' % 1, b'{"n": "%s"}' % (b'x' * 1000)) + fakes.message_frame(b'%016d' % 2)
        for start in range(0, len(data), 100):
            connection.stream.feed(data[start:start + 100])
            await asyncio.sleep(0.01)
            assert start + 100 >= len(data) or connection.last_data == connection.last_read
        assert [len(message.body) for message in window.accepted] == [1009, 2]
        reading.cancel()
    with_consumer(steps)


@pytest.mark.parametrize('size', [3, 0, -1, 29])
def test_a_frame_of_an_impossible_size_ends_the_connection(size):
    async def steps(consumer, window, connection):
        kind = nsq.FRAME_TYPE_MESSAGE if size == 29 else nsq.FRAME_TYPE_RESPONSE
        connection.stream.feed(size.to_bytes(4, 'big', signed=True) + kind.to_bytes(4, 'big') + b'x' * 40)
        with pytest.raises(NsqdError, match='size'):
            await asyncio.wait_for(connection.read_messages(), 100)
    with_consumer(steps)


def test_what_was_asked_for_and_is_not_offered_ends_the_handshake_before_a_secret_is_sent():
    async def steps(consumer, window, connection):
        taken(connection)
        connection.info = {}
        with pytest.raises(NsqdError, match='does not offer it'):
            await connection.start_tls(None)
        with pytest.raises(NsqdError, match='does not use AUTH'):
            await asyncio.wait_for(connection.authenticate(b'secret'), 1)
        connection.info = {'auth_required': True}
        with pytest.raises(NsqdError, match='AUTH required'):
            await connection.authenticate(None)
        assert taken(connection) == []
    with_consumer(steps)


def test_a_connection_closes_behind_all_answers_and_after_close_wait():
    async def steps(consumer, window, connection):
        come(connection, 1)
        reading = asyncio.ensure_future(connection.read_messages())
        taken(connection)
        closing = asyncio.ensure_future(consumer.close())
        await asyncio.sleep(0.2)
        connection.stream.feed(fakes.message_frame(b'%016d' % 2))   # it was on its way
        await asyncio.sleep(0.2)
        assert (taken(connection), connection.stream.closed) == (['RDY 0', 'CLS'], False)
        connection.stream.feed(fakes.frame(nsq.FRAME_TYPE_RESPONSE, b'CLOSE_WAIT'))
        await closing
        assert taken(connection) == ['REQ 0000000000000001 0', 'REQ 0000000000000002 0']
        assert (connection.stream.closed, consumer.in_flight) == (True, {})
        reading.cancel()
    with_consumer(steps)


def test_an_nsqd_that_does_not_answer_cls_holds_up_nobody():
    async def steps(consumer, window, connection):
        await consumer.close()
        assert asyncio.get_running_loop().time() == pytest.approx(1001)
    with_consumer(steps)


def test_a_lost_connection_is_a_failure_of_the_queue_only_when_it_was_the_last():
    async def steps(consumer, window, one, two):
        consumer.on_disconnect(one, 'gone', xmsrv.ChangeLog())
        assert (consumer.health.is_up('queue'), consumer.connections) == (True, [two])
        consumer.on_disconnect(two, 'gone', xmsrv.ChangeLog())
        assert not consumer.health.is_up('queue')
        assert one.stream.closed and two.stream.closed
    with_consumer(steps, connections=2)


def test_nsqds_that_are_named_no_more_are_not_connected_again(monkeypatch):
    tried = []

    async def refused(connection):
        tried.append((connection.address[1], asyncio.get_running_loop().time() - 1000))
        raise ConnectionRefusedError(111, 'refused')

    async def steps(consumer, window):
        monkeypatch.setattr(Subscription, 'open', refused)
        consumer.update_nsqds({('127.0.0.1', 1): None, ('127.0.0.1', 2): None})
        await asyncio.sleep(60)
        consumer.update_nsqds({('127.0.0.1', 2): None})
        await asyncio.sleep(60)
        assert max(at for port, at in tried if port == 1) <= 60
        at = [at for port, at in tried if port == 2]
        delays = [b - a for a, b in zip(at, at[1:], strict=False)]
        assert delays[0] <= 0.1 and 2.5 <= max(delays) <= 5 and len(at) < 70
    with_consumer(steps, connections=0)


def test_a_source_is_exhausted_when_nobody_has_the_topic_or_all_of_rdy_is_in_flight():
    async def steps(consumer, window, connection):
        assert not consumer.is_exhausted
        messages = come(connection, *range(10))
        assert consumer.is_exhausted
        consumer.finish(messages[:1])
        assert not consumer.is_exhausted
        consumer.addresses.clear()
        assert consumer.is_exhausted
    with_consumer(steps, **{'max-in-flight': '10'})


# -- the connections, kept up

def opened(monkeypatch, steps, fates, found=None, poller=None, **nsq_options):
    """Runs `steps(consumer, attempts)`, not opened yet. fates: port -> what becomes of each attempt to connect: an
    exception that it raises, or the seconds for which the connection lasts; the last holds for all that follow."""
    attempts = []

    async def open(connection):
        port = connection.address[1]
        attempts.append((port, asyncio.get_running_loop().time() - 1000))
        fate = fates[port].pop(0) if len(fates[port]) > 1 else fates[port][0]
        connection.stream = fakes.Stream()
        await asyncio.sleep(0.01 * port)
        if isinstance(fate, Exception):
            raise fate
        connection.max_rdy, connection.msg_timeout, connection.max_msg_timeout, connection.idle_delay = (
            9, 60.0, 900.0, 1)
        connection.lasts = fate

    async def read(connection):
        await asyncio.sleep(connection.lasts)
        raise StreamClosedError

    async def find_nsqds(config, topic, patience=None, news=None):
        assert patience == xmsrv.LOOKUP_GRACE
        return dict.fromkeys(('127.0.0.1', port) for port in (fates if found is None else found))

    async def main():
        monkeypatch.setattr(Subscription, 'open', open)
        monkeypatch.setattr(Subscription, 'read_messages', read)
        monkeypatch.setattr(xmsrv, 'find_nsqds', find_nsqds)
        config, tasks = fakes.options(nsq=nsq_options), BackgroundTasks()
        consumer = Consumer(config, tasks, ConnectionOptions(config), 'orders', 'x-msrv', Health())
        consumer.poller = poller
        await steps(consumer, attempts)
        await tasks.cancel()
    clock.run(main())


REFUSED = ConnectionRefusedError(111, 'Connection refused')


def test_a_source_is_open_when_the_first_nsqd_is_connected(monkeypatch):
    async def steps(consumer, attempts):
        await consumer.open()
        assert [connection.address[1] for connection in consumer.connections] == [2]
        assert asyncio.get_running_loop().time() == pytest.approx(1000.02)
        assert not consumer.has_tried_all()
        await asyncio.sleep(0.02)
        assert [connection.address[1] for connection in consumer.connections] == [2, 3] and consumer.has_tried_all()
        assert consumer.connect_errors[('127.0.0.1', 1)] == 'Connection refused'
    opened(monkeypatch, steps, {1: [REFUSED], 2: [99], 3: [99]})


def test_a_source_without_any_nsqd_names_the_fault_of_each(monkeypatch):
    async def steps(consumer, attempts):
        with pytest.raises(Unavailable) as caught:
            await consumer.open()
        assert str(caught.value) == ('no nsqd can be reached: 127.0.0.1:1: Connection refused; '
                                     '127.0.0.1:2: the connection was closed')
        assert asyncio.get_running_loop().time() == pytest.approx(1000.02)
    opened(monkeypatch, steps, {1: [REFUSED], 2: [StreamClosedError()]})


def test_a_topic_that_no_nsqd_has_is_an_open_source_with_nothing_to_come(monkeypatch):
    async def steps(consumer, attempts):
        await consumer.open()
        assert consumer.is_exhausted and consumer.has_tried_all() and attempts == []
    opened(monkeypatch, steps, {}, found=[])


def test_a_bug_in_a_connection_is_not_taken_for_an_nsqd_that_is_away(monkeypatch):
    async def steps(consumer, attempts):
        with pytest.raises(ZeroDivisionError):
            await consumer.open()
    opened(monkeypatch, steps, {1: [ZeroDivisionError()]})


class Poller:
    """Names the nsqds that the test says, half a second after it was asked."""

    news = None

    def __init__(self):
        self.named, self.asked = [1], 0

    async def run(self):
        pass

    async def wait_for_answer(self):
        self.asked += 1
        await asyncio.sleep(0.5)
        self.consumer.update_nsqds(dict.fromkeys(('127.0.0.1', port) for port in self.named))


def test_a_connection_that_ends_is_made_again_once_nsqlookupd_still_names_the_nsqd(monkeypatch):
    poller = Poller()

    async def steps(consumer, attempts):
        poller.consumer = consumer
        await consumer.open()
        await asyncio.sleep(1.5)
        assert (consumer.connections, consumer.health.is_up('queue'), poller.asked) == ([], False, 1)
        await asyncio.sleep(0.5)
        assert (len(consumer.connections), consumer.health.is_up('queue'), len(attempts)) == (1, True, 2)
        assert consumer.connect_errors == {('127.0.0.1', 1): None}
        poller.named = []
        await asyncio.sleep(60)
        assert (consumer.connections, len(attempts), consumer.addresses, poller.asked) == ([], 2, [], 2)
    opened(monkeypatch, steps, {1: [1, 10]}, poller=poller)


def test_an_nsqd_that_is_named_no_more_stays_for_as_long_as_its_connection(monkeypatch):
    poller = Poller()

    async def steps(consumer, attempts):
        poller.consumer, poller.named = consumer, []
        await consumer.open()
        consumer.update_nsqds({})
        await asyncio.sleep(5)
        assert len(consumer.connections) == 1
        await asyncio.sleep(60)
        assert (consumer.connections, consumer.health.is_up('queue'), len(attempts)) == ([], False, 1)
        consumer.update_nsqds({('127.0.0.1', 1): None})   # it is named again: that is worth a try at once
        await asyncio.sleep(0.1)
        assert len(attempts) == 2 and consumer.connections
    opened(monkeypatch, steps, {1: [8]}, poller=poller)


def test_a_queue_that_is_down_says_when_nsqlookupd_names_no_nsqd_any_more(monkeypatch):
    """The topic was deleted: whoever looks for the nsqd of the last error looks in vain."""
    async def steps(consumer, attempts):
        await consumer.open()
        consumer.update_nsqds({})
        assert consumer.health.is_up('queue')   # its connection lasts
        await asyncio.sleep(1.1)
        assert consumer.health.errors['queue'].text == 'nsqd 127.0.0.1:1: the connection was closed'
        await asyncio.sleep(1)   # nsqlookupd is asked before the next try
        assert consumer.health.errors['queue'].text == 'no nsqd has the topic orders yet'
    poller = Poller()
    poller.named = []
    opened(monkeypatch, lambda consumer, attempts: steps(setattr(poller, 'consumer', consumer) or consumer, attempts),
           {1: [1, 99]}, poller=poller)


def test_an_outage_of_one_of_two_nsqds_is_told_once_and_its_end_too(monkeypatch, caplog):
    monkeypatch.setattr(xmsrv.log, 'propagate', True)
    caplog.set_level(logging.INFO, 'x-msrv')

    async def steps(consumer, attempts):
        await consumer.open()
        await asyncio.sleep(20)
        assert len([connection for connection in consumer.connections if connection.address[1] == 2]) == 1
    opened(monkeypatch, steps, {1: [99], 2: [1, REFUSED, REFUSED, 99]})
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ('WARNING', 'nsqd 127.0.0.1:2: the connection was closed'),
        ('WARNING', 'nsqd 127.0.0.1:2: Connection refused'), ('INFO', 'nsqd 127.0.0.1:2 is back')]


@pytest.fixture
def lines(monkeypatch, caplog):
    """A function: (level, text) of each line of the log so far that an operator sees without -v."""
    monkeypatch.setattr(xmsrv.log, 'propagate', True)
    caplog.set_level(logging.INFO, 'x-msrv')
    return lambda: [(record.levelname, record.getMessage()) for record in caplog.records]


def test_an_outage_of_the_queue_has_the_reason_of_the_latest_attempt_and_each_change_is_a_line(monkeypatch, lines):
    """All that is shown of the outage is Health's, so nobody reads of a closed connection while nsqd wants AUTH."""
    seen = []

    async def steps(consumer, attempts):
        await consumer.open()
        while len(attempts) < 8:
            await asyncio.sleep(0.02)
            failure = consumer.health.errors.get('queue')
            if failure and [failure.text] != seen[-1:]:
                seen.append(failure.text)
        await asyncio.sleep(1)
        assert consumer.health.is_up('queue')
    opened(monkeypatch, steps, {1: [1, REFUSED, REFUSED, *[xmsrv.NsqdError('E_UNAUTHORIZED')] * 3, REFUSED, 99]})
    told = ['nsqd 127.0.0.1:1: the connection was closed',
            *(f'no nsqd can be reached: 127.0.0.1:1: {why}' for why in
              ('Connection refused', 'E_UNAUTHORIZED', 'Connection refused'))]
    assert seen == told
    assert [line for line in lines() if 'recovered' not in line[1]] == [
        *(('WARNING', f'queue unavailable ({text}): retrying, consumption paused') for text in told),
        ('INFO', 'nsqd 127.0.0.1:1 is back')]


def test_an_outage_of_all_nsqds_names_each_with_its_latest_reason(monkeypatch, lines):
    """An nsqd that stays away when another one is back has a line of its own then."""
    async def steps(consumer, attempts):
        await consumer.open()
        await asyncio.sleep(4)
        assert consumer.health.errors['queue'].text == (
            'no nsqd can be reached: 127.0.0.1:1: Connection refused; 127.0.0.1:2: no route')
        await asyncio.sleep(30)
        assert consumer.health.is_up('queue')
    opened(monkeypatch, steps, {1: [1, *[REFUSED] * 6, 99], 2: [2, xmsrv.NsqdError('no route')]})
    texts = [text for _, text in lines()]
    assert texts[:2] == ['nsqd 127.0.0.1:1: the connection was closed', 'nsqd 127.0.0.1:1: Connection refused']
    assert texts[-3:-1] == ['nsqd 127.0.0.1:1 is back', texts[-2]] and texts[-2].startswith('queue recovered')
    assert texts[-1] == 'nsqd 127.0.0.1:2: no route'


def test_a_source_that_is_opened_again_says_only_what_is_new(monkeypatch, lines):
    """The runner opens another one while the queue is down, each time."""
    health = Health()

    async def steps(consumer, attempts):
        consumer.health = health
        with pytest.raises(Unavailable) as caught:
            await consumer.open()
        health.report_failure('queue', str(caught.value))
    for _ in range(3):
        opened(monkeypatch, steps, {1: [REFUSED], 2: [REFUSED]})
    assert [text for _, text in lines()] == [
        'nsqd 127.0.0.1:1: Connection refused', 'nsqd 127.0.0.1:2: Connection refused',
        'queue unavailable (no nsqd can be reached: 127.0.0.1:1: Connection refused; 127.0.0.1:2: Connection refused): '
        'retrying, consumption paused']


def test_an_nsqd_that_closes_each_connection_is_asked_less_and_less_often(monkeypatch, lines):
    """And does not fill the log: a connection that ends at once is no recovery to rely on."""
    async def steps(consumer, attempts):
        await consumer.open()
        await asyncio.sleep(60)
        starts = [start for _, start in attempts]
        assert starts[1] - starts[0] < 0.3 and starts[-1] - starts[-2] > 2 and len(attempts) < 30
    opened(monkeypatch, steps, {1: [0.1]})
    assert len(lines()) < 90


def test_delays_begin_anew_after_a_connection_that_was_up(monkeypatch):
    async def steps(consumer, attempts):
        with pytest.raises(Unavailable):
            await consumer.open()
        await asyncio.sleep(100)
        last, again = attempts[-2:]
        assert len(attempts) == 10 and again[1] - last[1] <= 50.2
    opened(monkeypatch, steps, {1: [*[REFUSED] * 8, 50, 200]})

"""What a program that uses Python's etcd3 sees of a store: printed line by line, so that two stores can be compared.

Usage: story.py PORT. Nothing that a store may choose (ids, times) is printed.
"""

import queue
import sys
import threading

import etcd3
import grpc

PATIENCE = 30


def say(what, *values):
    print(what + ":", *values, flush=True)


def text(raw):
    return None if raw is None else raw.decode()


def attempt(what, call):
    """Prints what a call that is to fail fails with."""
    try:
        say(what, "no error", call())
    except grpc.RpcError as error:
        say(what, type(error).__name__, error.code().name, error.details())
    except etcd3.exceptions.Etcd3Exception as error:
        say(what, type(error).__name__, *(word for word in error.args))


def shown(pair):
    value, facts = pair
    if facts is None:
        return (value, None)
    return (text(facts.key), text(value), facts.create_revision, facts.mod_revision, facts.version, facts.lease_id != 0)


def keys(client):
    say("put", client.put("k/1", "one").header.revision)
    say("put with the old", text(client.put("k/1", "uno", prev_kv=True).prev_kv.value))
    for key, value in [("k/2", "two"), ("k/3", "three"), ("k/4", "")]:
        client.put(key, value)
    say("get", shown(client.get("k/1")))
    say("get serializable", shown(client.get("k/1", serializable=True)))
    say("get nothing", shown(client.get("nothing")))
    for order, target in [("ascend", "key"), ("descend", "key"), ("descend", "mod"), ("ascend", "value"), ("ascend", "version")]:
        say("prefix", order, target, [shown(pair) for pair in client.get_prefix("k/", sort_order=order, sort_target=target)])
    say("keys only", [shown(pair) for pair in client.get_prefix("k/", keys_only=True)])
    say("range", [shown(pair) for pair in client.get_range("k/2", "k/4")])
    say("all", len(list(client.get_all())))
    answer = client.get_range_response("k/1", "k0", limit=2)
    say("limit", answer.count, answer.more, [text(kv.key) for kv in answer.kvs])
    say("replace", client.replace("k/2", "two", "dos"), client.replace("k/2", "two", "zwei"))
    say("put if not there", client.put_if_not_exists("k/5", "five"), client.put_if_not_exists("k/5", "six"))
    say("delete", client.delete("k/4"), client.delete("k/4"))
    gone = client.delete("k/3", prev_kv=True, return_response=True)
    say("delete with the old", gone.deleted, [text(kv.value) for kv in gone.prev_kvs])
    say("delete prefix", client.delete_prefix("k/").deleted, client.delete_prefix("k/").deleted)
    attempt("empty key", lambda: client.put("", "value"))


def transactions(client):
    client.put("t", "1")
    compares = client.transactions
    for what, compare in [
        ("value", compares.value("t") == "1"),
        ("value differs", compares.value("t") != "1"),
        ("value below", compares.value("t") < "2"),
        ("version", compares.version("t") > 0),
        ("create", compares.create("t") == 0),
        ("mod", compares.mod("t") > 1),
    ]:
        done, answers = client.transaction(
            compare=[compare],
            success=[compares.put("t", "1"), compares.get("t")],
            failure=[compares.get("t"), compares.delete("nothing")],
        )
        reads = [[shown(pair) for pair in answer] for answer in answers if isinstance(answer, list)]
        say("txn", what, done, len(answers), reads)
    attempt(
        "txn twice",
        lambda: client.transaction(compare=[], success=[compares.put("t", "1"), compares.put("t", "2")], failure=[]),
    )
    inner = compares.txn(compare=[compares.value("t") == "1"], success=[compares.put("u", "in")], failure=[])
    done, answers = client.transaction(compare=[], success=[inner], failure=[])
    say("txn in a txn", done, len(answers), shown(client.get("u")))


def leases(client):
    lease = client.lease(60)
    say("granted", lease.granted_ttl, 0 < lease.remaining_ttl <= 60)
    client.put("l/1", "one", lease=lease)
    client.put("l/2", "two", lease=lease)
    say("attached", sorted(text(key) for key in lease.keys), shown(client.get("l/1")))
    say("refresh", [answer.TTL for answer in lease.refresh()])
    lease.revoke()
    say("revoked", shown(client.get("l/1")), client.get_lease_info(lease.id).TTL)
    attempt("revoke again", lease.revoke)
    attempt("put with it", lambda: client.put("l/1", "one", lease=lease))
    say("refresh again", [answer.TTL for answer in lease.refresh()])
    short = client.lease(2)
    events, cancel = client.watch("l/short")
    client.put("l/short", "soon gone", lease=short)
    for event in events:
        say("expiry", type(event).__name__, text(event.key))
        if isinstance(event, etcd3.events.DeleteEvent):
            break
    cancel()


def watches(client):
    start = client.put("w/1", "one").header.revision
    client.put("w/1", "uno")
    client.put("w/2", "two")
    client.delete("w/1")
    events, cancel = client.watch_prefix("w/", start_revision=start, prev_kv=True)
    for _, event in zip(range(4), events):
        say("past", type(event).__name__, text(event.key), text(event.value), text(event.prev_value), event.version)
    client.put("w/3", "live")
    say("live", text(next(events).key))
    cancel()

    heard = queue.Queue()
    number = client.add_watch_callback("w/", heard.put, range_end="w0")
    client.put("w/4", "called")
    answer = heard.get(timeout=PATIENCE)
    say("callback", answer.header.revision - start, [(text(event.key), text(event.value)) for event in answer.events])
    client.transaction(
        compare=[], success=[client.transactions.put("w/5", "a"), client.transactions.put("w/6", "b")], failure=[]
    )
    say("callback", [(text(event.key), event.mod_revision - start) for event in heard.get(timeout=PATIENCE).events])
    client.cancel_watch(number)

    client.compact(start + 2, physical=True)
    number = client.add_watch_callback("w/1", heard.put, start_revision=start)
    error = heard.get(timeout=PATIENCE)
    say("compacted watch", type(error).__name__, getattr(error, "compacted_revision", start) - start)
    attempt("compact again", lambda: client.compact(start + 2))
    attempt("compact the future", lambda: client.compact(start + 1000))


def locks(client, other):
    mine, theirs = client.lock("lock", ttl=60), other.lock("lock", ttl=60)
    say("acquire", mine.acquire(), mine.is_acquired())
    say("in vain", theirs.acquire(timeout=1), theirs.is_acquired())
    order = queue.Queue()

    def wait():
        # The client may look for the release after it happened: then it waits in vain, and has to ask again.
        while not theirs.acquire(timeout=2):
            pass
        order.put(("acquired", theirs.is_acquired()))

    waiting = threading.Thread(target=wait)
    waiting.start()
    say("release", mine.release(), mine.is_acquired())
    say("handed over", order.get(timeout=PATIENCE))
    waiting.join()
    say("refresh", [answer.TTL for answer in theirs.refresh()])
    say("release", theirs.release(), theirs.release())
    with client.lock("another", ttl=20) as held:
        say("with", held.is_acquired())
    say("left", [shown(pair) for pair in client.get_prefix("/locks/")])


def cluster(client):
    say("members", [(member.name, len(list(member.peer_urls)), len(list(member.client_urls))) for member in client.members])
    status = client.status()
    say("status", status.version.rsplit(".", 1)[0], status.leader.name, status.db_size > 0, status.raft_index > 0)
    say("alarms", list(client.list_alarms()))


def main():
    port = int(sys.argv[1])
    client, other = (etcd3.client(host="127.0.0.1", port=port, timeout=PATIENCE) for _ in range(2))
    keys(client)
    transactions(client)
    leases(client)
    watches(client)
    locks(client, other)
    cluster(client)


main()

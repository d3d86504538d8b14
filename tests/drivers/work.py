"""What an application does all day, with PyMongo: `work.py URI`. Says nothing, and fails where something is not as it should be.

`work.py URI refused` is for a proxy whose rules deny shop.secrets, let shop.rare be asked for once in an age, and write nothing to shop.silent.
"""

import sys
import threading

import bson
import gridfs
import pymongo
from pymongo.errors import OperationFailure

client = pymongo.MongoClient(sys.argv[1], serverSelectionTimeoutMS=20_000, appname="pymongo at work")
shop = client[f"shop_{bson.ObjectId()}"]


def work():
    # Many documents, and many batches.
    shop.orders.insert_many({"_id": n, "group": n % 7, "text": "x" * 500} for n in range(10_000))
    assert [order["_id"] for order in shop.orders.find().sort("_id").batch_size(300)] == list(range(10_000))
    shop.orders.create_index("group")
    assert shop.orders.update_many({"group": 3}, {"$inc": {"n": 1}}).modified_count == 1429
    assert len(list(shop.orders.aggregate([{"$group": {"_id": "$group"}}]))) == 7
    # Two cursors at once, of which one is given up.
    first, second = shop.orders.find().batch_size(10), shop.orders.find().batch_size(10)
    for _ in range(50):
        assert next(first) == next(second)
    first.close()
    assert sum(1 for _ in second) == 9_950
    bulk = [pymongo.UpdateOne({"_id": n}, {"$set": {"b": n}}, upsert=True) for n in range(9_000, 12_000)]
    done = shop.orders.bulk_write(bulk + [pymongo.DeleteMany({"group": 5})], ordered=False)
    assert (done.modified_count, done.upserted_count) == (1_000, 2_000), done
    try:
        shop.orders.insert_one({"_id": 1})
        raise AssertionError("a second one was let in")
    except pymongo.errors.DuplicateKeyError:
        pass
    # As large as can be.
    large = bytes(range(256)) * 50_000
    shop.large.insert_one({"_id": 1, "bytes": large})
    assert shop.large.find_one()["bytes"] == large
    # A file.
    files = gridfs.GridFSBucket(shop)
    file = files.upload_from_stream("file", large)
    assert files.open_download_stream(file).read() == large
    # Transactions.
    with client.start_session() as session:
        for number, commits in enumerate([True, False]):
            session.start_transaction()
            shop.one.insert_one({"_id": number}, session=session)
            shop.two.insert_one({"_id": number}, session=session)
            session.commit_transaction() if commits else session.abort_transaction()
    assert shop.one.count_documents({}) == shop.two.count_documents({}) == 1
    # What changes.
    with shop.watched.watch(max_await_time_ms=500) as changes:
        threading.Timer(0.2, lambda: shop.watched.insert_many({"_id": n} for n in range(50))).start()
        assert [next(changes)["documentKey"]["_id"] for _ in range(50)] == list(range(50))
    # Without an answer, and with more answers than questions.
    unacknowledged = shop.get_collection("silent", write_concern=pymongo.WriteConcern(w=0))
    for number in range(100):
        unacknowledged.insert_one({"_id": number})
    while shop.silent.count_documents({}) < 100:
        pass
    if "loadBalanced" not in sys.argv[1]:
        exhausted = shop.orders.find({}, cursor_type=pymongo.CursorType.EXHAUST, batch_size=100)
        assert sum(1 for _ in exhausted) == shop.orders.count_documents({})
    # Many at once.
    def look(thread):
        for number in range(thread, 500, 10):
            found = shop.orders.find_one({"_id": number})
            assert (found is None) == (number % 7 == 5), found
    fails = []
    threading.excepthook = lambda failed: fails.append(failed.exc_value)
    threads = [threading.Thread(target=look, args=(thread,)) for thread in range(10)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not fails, fails


def refused():
    cleared = []

    class Pools(pymongo.monitoring.ConnectionPoolListener):
        def pool_cleared(self, event):
            cleared.append(event)

        def ignore(self, event):
            pass

        pool_created = pool_ready = pool_closed = connection_created = connection_ready = connection_closed = ignore
        connection_check_out_started = connection_check_out_failed = connection_checked_out = connection_checked_in = ignore

    own = pymongo.MongoClient(sys.argv[1], serverSelectionTimeoutMS=20_000, event_listeners=[Pools()])
    for act, code in [
        (lambda: own.shop.secrets.find_one(), 13),
        (lambda: own.shop.secrets.insert_one({}), 13),
        (lambda: own.shop.open.aggregate([{"$lookup": {"from": "secrets", "as": "x"}}]), 13),
        (lambda: [own.shop.rare.find_one() for _ in range(2)], 462),
    ]:
        try:
            act()
            raise AssertionError(f"{code} was let in")
        except OperationFailure as failed:
            assert failed.code == code, failed
            assert failed.has_error_label("SystemOverloadedError") == (code == 462), failed
        # The connection lives on.
        assert own.shop.open.find_one() is None
    # Nobody answers this, and what is asked next has its own answer.
    silent = own.shop.get_collection("silent", write_concern=pymongo.WriteConcern(w=0))
    for number in range(20):
        silent.insert_one({"_id": number})
        assert own.shop.open.find_one() is None
    assert own.shop.silent.count_documents({}) == 0
    assert not cleared, cleared


refused() if "refused" in sys.argv else work()

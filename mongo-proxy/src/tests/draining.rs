//! A proxy that is to stop.

use super::*;

#[tokio::test]
async fn a_proxy_that_stops_serves_what_is_under_way_to_its_end() {
    let stage = stage(|_| {}).await;
    let (mut idle, mut idle_server) = stage.connect().await;
    let (mut client, mut server) = stage.connect().await;
    client.write_all(&ping(1)).await.unwrap();
    soon(whole_message(&mut server)).await;
    stage.cancel.cancel();
    assert!(soon(rest(&mut idle)).await.is_empty() && soon(rest(&mut idle_server)).await.is_empty());
    server.write_all(&message(2, 1, 0, &doc! { "ok": 1 })).await.unwrap();
    assert_eq!(soon(whole_message(&mut client)).await.0.response_to, 1);
    assert!(soon(rest(&mut client)).await.is_empty());
    soon(stage.running).await.unwrap().unwrap();
    assert!(TcpStream::connect(stage.proxy).await.is_err());
}

#[tokio::test]
async fn a_proxy_that_stops_waits_for_no_stream_without_an_end() {
    let stage = stage(|settings| settings.drain_within = Duration::from_secs(3600)).await;
    let (mut watching, mut server) = stage.connect().await;
    watching.write_all(&message(1, 0, EXHAUST_ALLOWED, &doc! { "hello": 1, "$db": "admin" })).await.unwrap();
    soon(whole_message(&mut server)).await;
    server.write_all(&message(10, 1, MORE_TO_COME, &doc! { "ok": 1 })).await.unwrap();
    assert_eq!(soon(whole_message(&mut watching)).await.0.request_id, 10);
    stage.cancel.cancel();
    assert!(soon(rest(&mut watching)).await.is_empty());
    soon(stage.running).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_proxy_that_stops_waits_for_nobody_for_ever() {
    let stage = stage(|settings| settings.drain_within = Duration::from_millis(500)).await;
    let (mut slow, mut server) = stage.connect().await;
    slow.write_all(&ping(1)).await.unwrap();
    soon(whole_message(&mut server)).await;
    stage.cancel.cancel();
    // The server never answers.
    soon(stage.running).await.unwrap().unwrap();
    assert!(soon(rest(&mut slow)).await.is_empty());
}

#[tokio::test]
async fn a_proxy_that_drains_lets_what_was_begun_go_on_and_nothing_new() {
    let stage = stage(|_| {}).await;
    let (mut client, mut server) = stage.connect().await;
    served(&mut client, &mut server, &find(1)).await;
    stage.handle.drain();
    client.write_all(&find(2)).await.unwrap();
    let answer = refused(&mut client, 2).await;
    assert_eq!(why(&answer), (91, "ShutdownInProgress"));
    let goes_on = [
        doc! { "getMore": 7_i64, "collection": "orders", "$db": "shop" },
        doc! { "insert": "orders", "autocommit": false, "txnNumber": 1_i64, "$db": "shop" },
        doc! { "commitTransaction": 1, "autocommit": false, "$db": "admin" },
        doc! { "hello": 1, "$db": "admin" },
    ];
    for (number, command) in (3..).zip(goes_on) {
        served(&mut client, &mut server, &message(number, 0, 0, &command)).await;
    }
    client
        .write_all(&message(9, 0, 0, &doc! { "insert": "o", "startTransaction": true, "autocommit": false, "$db": "d" }))
        .await
        .unwrap();
    assert_eq!(refused(&mut client, 9).await.get_i32("code").unwrap(), 91);
    // New connections are taken as long as it listens: a driver that has dropped all of its own goes on with its cursor on another.
    let (mut other, mut other_server) = stage.connect().await;
    let more = message(1, 0, 0, &doc! { "getMore": 7_i64, "collection": "orders", "$db": "shop" });
    served(&mut other, &mut other_server, &more).await;
}

#[tokio::test]
async fn who_is_refused_by_a_proxy_that_drains_may_try_again_what_was_not_begun() {
    let stage = stage(|_| {}).await;
    let (mut client, mut server) = stage.connect().await;
    served(&mut client, &mut server, &ping(1)).await;
    stage.handle.drain();
    let cases = [
        (doc! { "insert": "o", "txnNumber": 1_i64, "$db": "d" }, Some("RetryableWriteError")),
        (
            doc! { "insert": "o", "txnNumber": 1_i64, "startTransaction": true, "autocommit": false, "$db": "d" },
            Some("TransientTransactionError"),
        ),
        (doc! { "insert": "o", "$db": "d" }, None),
    ];
    for (number, (command, label)) in (2..).zip(cases) {
        client.write_all(&message(number, 0, 0, &command)).await.unwrap();
        let answer = refused(&mut client, number).await;
        let labels = answer.get_array("errorLabels").ok().map(|labels| labels[0].as_str().unwrap());
        assert_eq!((why(&answer).0, labels), (91, label), "{command}");
    }
}

/// The answer to a find that leaves a cursor, or none.
fn batch(id: i64) -> Document {
    doc! { "cursor": { "firstBatch": [{ "_id": 1 }], "id": id, "ns": "shop.orders" }, "ok": 1 }
}

fn more(request_id: i32) -> Vec<u8> {
    message(request_id, 0, 0, &doc! { "getMore": 7_i64, "collection": "orders", "$db": "shop" })
}

#[tokio::test]
async fn a_proxy_that_stops_keeps_a_cursor_that_is_younger_than_the_time_for_draining() {
    let stage = stage(|settings| settings.drain_within = Duration::from_secs(4)).await;
    let (mut client, mut server) = stage.connect().await;
    // One that is answered only when it stops already.
    client.write_all(&find(1)).await.unwrap();
    soon(whole_message(&mut server)).await;
    stage.cancel.cancel();
    let (mut other, mut other_server) = stage.connect().await;
    served(&mut other, &mut other_server, &ping(1)).await;
    server.write_all(&message(9, 1, 0, &batch(7))).await.unwrap();
    soon(whole_message(&mut client)).await;
    for number in 2..6 {
        answered(&mut client, &mut server, &more(number), &batch(7)).await;
    }
    // Also on another connection, as drivers drop those of a server that is about to stop.
    answered(&mut other, &mut other_server, &more(2), &batch(7)).await;
    client.write_all(&find(6)).await.unwrap();
    assert_eq!(why(&refused(&mut client, 6).await).0, 91);
    // It ends by itself.
    assert!(soon(rest(&mut client)).await.is_empty());
    soon(stage.running).await.unwrap().unwrap();
    assert!(TcpStream::connect(stage.proxy).await.is_err());
}

#[tokio::test]
async fn a_proxy_that_stops_waits_for_nothing_if_there_is_no_cursor_or_nobody_is_left() {
    for (cursor, leaves) in [(0, false), (7, true)] {
        let stage = stage(|settings| settings.drain_within = Duration::from_secs(3600)).await;
        let (mut client, mut server) = stage.connect().await;
        answered(&mut client, &mut server, &find(1), &batch(cursor)).await;
        // The next is served when it is known what the last has left.
        served(&mut client, &mut server, &ping(2)).await;
        stage.cancel.cancel();
        if leaves {
            drop(client);
        } else {
            assert!(soon(rest(&mut client)).await.is_empty());
        }
        soon(stage.running).await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn what_waits_for_a_rule_when_the_proxy_stops_is_told_so() {
    let limit = ConcurrencyRule::new(1).waiting(Duration::from_secs(3600));
    let stage = stage(rules([Rule::new("one", [Action::LimitConcurrency(limit)])])).await;
    let (mut first, mut first_server) = stage.connect().await;
    log_in(&mut first, &mut first_server).await;
    let (mut second, mut second_server) = stage.connect().await;
    log_in(&mut second, &mut second_server).await;
    first.write_all(&message(1, 0, 0, &doc! { "find": "c", "$db": "d" })).await.unwrap();
    soon(whole_message(&mut first_server)).await;
    second.write_all(&message(1, 0, 0, &doc! { "find": "c", "$db": "d" })).await.unwrap();
    let under_way = async {
        while stage.handle.rules().rules[0].matched < 2 {
            tokio::task::yield_now().await;
        }
    };
    soon(under_way).await;
    stage.cancel.cancel();
    assert_eq!(why(&refused(&mut second, 1).await).0, 91);
    first_server.write_all(&message(9, 1, 0, &doc! { "ok": 1 })).await.unwrap();
    soon(whole_message(&mut first)).await;
    soon(stage.running).await.unwrap().unwrap();
}

//! What becomes of requests that rules have something to say about.

use bson::RawDocumentBuf;

use super::*;
use crate::{Action, ConcurrencyRule, Denial, Key, Match, RateRule, RequestLog, Rule, Rules, wire::scan::CHECKSUM_PRESENT};

fn rules(rules: impl IntoIterator<Item = Rule>) -> impl FnOnce(&mut ProxySettings) {
    let rules = Rules::new(rules);
    move |settings| settings.rules = rules
}

fn find(request_id: i32) -> Vec<u8> {
    message(request_id, 0, 0, &doc! { "find": "orders", "$db": "shop" })
}

/// What is in a message that has a body and nothing else.
fn body_of(message: &[u8]) -> Document {
    Document::from_reader(&message[HEADER + 5..]).unwrap()
}

/// The next message is the answer to this, and says that.
async fn refused(client: &mut TcpStream, to: i32) -> Document {
    let (header, message) = soon(whole_message(client)).await;
    assert_eq!(header.response_to, to);
    let answer = body_of(&message);
    assert_eq!(answer.get_f64("ok").unwrap(), 0.0);
    answer
}

fn why(answer: &Document) -> (i32, &str) {
    (answer.get_i32("code").unwrap(), answer.get_str("codeName").unwrap())
}

/// A request comes to the server, is answered, and the answer comes back.
async fn served(client: &mut TcpStream, server: &mut TcpStream, request: &[u8]) -> Vec<u8> {
    answered(client, server, request, &doc! { "ok": 1 }).await
}

async fn answered(client: &mut TcpStream, server: &mut TcpStream, request: &[u8], answer: &Document) -> Vec<u8> {
    client.write_all(request).await.unwrap();
    let (header, seen) = soon(whole_message(server)).await;
    server.write_all(&message(1000, header.request_id, 0, answer)).await.unwrap();
    assert_eq!(soon(whole_message(client)).await.0.response_to, header.request_id);
    seen
}

#[tokio::test]
async fn who_is_denied_is_told_so_and_the_connection_lives_on() {
    for (denial, code, name) in [
        (Denial::Unauthorized, 13, "Unauthorized"),
        (Denial::QueryRejected, 411, "QueryRejectedBySettings"),
        (Denial::ReadOnly, 371, "UserWritesBlocked"),
    ] {
        let stage = stage(rules([Rule::new("no", [Action::Deny(denial)])])).await;
        let (mut client, mut server) = stage.connect().await;
        client.write_all(&find(1)).await.unwrap();
        let answer = refused(&mut client, 1).await;
        assert_eq!(why(&answer), (code, name));
        assert!(!answer.contains_key("errorLabels") && answer.get_str("errmsg").unwrap().contains("\"no\""), "{answer}");
        // The server has seen nothing of it.
        assert_eq!(served(&mut client, &mut server, &ping(2)).await, ping(2));
        assert_eq!(stage.handle.statistics().refused["denied"], 1);
        assert_eq!(stage.metrics.counter_value("mongo_proxy_refused_total", &[("reason", "denied")]), Some(1));
        let logged = stage.handle.requests();
        assert_eq!(
            (logged[0].command.as_str(), logged[0].namespace.as_str(), logged[0].refused),
            ("find", "shop.orders", Some("denied"))
        );
    }
}

#[tokio::test]
async fn of_a_large_request_that_is_denied_the_rest_is_thrown_away() {
    let stage =
        stage(rules([Rule::new("no", [Action::Deny(Denial::ReadOnly)]).with_match(Match::default().commands(["insert"]))])).await;
    let (mut client, mut server) = stage.connect().await;
    log_in(&mut client, &mut server).await;
    let documents: Vec<Document> = (0..3000).map(|number| doc! { "_id": number, "text": "x".repeat(1000) }).collect();
    let insert = with_sequence(2, 0, &doc! { "insert": "c", "$db": "d" }, "documents", &documents);
    client.write_all(&insert).await.unwrap();
    assert_eq!(refused(&mut client, 2).await.get_i32("code").unwrap(), 371);
    assert_eq!(served(&mut client, &mut server, &ping(3)).await, ping(3));
    // Also if it turns out to be no message at all.
    let mut bad = with_sequence(4, 0, &doc! { "insert": "c", "$db": "d" }, "documents", &documents);
    *bad.last_mut().unwrap() = 1;
    client.write_all(&bad).await.unwrap();
    assert_eq!(refused(&mut client, 4).await.get_i32("code").unwrap(), 22);
    assert!(soon(rest(&mut server)).await.is_empty());
}

#[tokio::test]
async fn who_awaits_no_answer_is_refused_without_one() {
    let stage = stage(rules([Rule::new("no", [Action::Deny(Denial::ReadOnly)])])).await;
    let (mut client, mut server) = stage.connect().await;
    client.write_all(&message(1, 0, MORE_TO_COME, &doc! { "insert": "c", "$db": "d" })).await.unwrap();
    client.write_all(&find(2)).await.unwrap();
    // The first answer is that to the second.
    refused(&mut client, 2).await;
    assert_eq!(served(&mut client, &mut server, &ping(3)).await, ping(3));
    assert_eq!(stage.handle.statistics().refused["denied"], 2);
}

#[tokio::test]
async fn who_comes_too_often_is_told_to_come_again_in_the_words_of_an_overloaded_server() {
    let limit = RateRule::new(0.1, 2).keyed(Key::Client);
    let stage = stage(rules([Rule::new("often", [Action::LimitRate(limit)])])).await;
    let (mut client, mut server) = stage.connect().await;
    log_in(&mut client, &mut server).await;
    for number in [1, 2] {
        served(&mut client, &mut server, &find(number)).await;
    }
    client.write_all(&find(3)).await.unwrap();
    let answer = refused(&mut client, 3).await;
    assert_eq!(why(&answer), (462, "IngressRequestRateLimitExceeded"));
    let labels: Vec<_> = answer.get_array("errorLabels").unwrap().iter().map(|label| label.as_str().unwrap()).collect();
    assert_eq!(labels, ["SystemOverloadedError", "RetryableError"]);
    let after = answer.get_i32("baseBackoffMS").unwrap();
    assert!((8_000..=10_000).contains(&after), "{after}");
    assert_eq!(stage.handle.rules().rules[0].refused, 1);
}

#[tokio::test]
async fn who_can_wait_is_let_through_when_it_is_time() {
    let limit = RateRule::new(20.0, 1).waiting(Duration::from_secs(30));
    let stage = stage(rules([Rule::new("evenly", [Action::LimitRate(limit)])])).await;
    let (mut client, mut server) = stage.connect().await;
    log_in(&mut client, &mut server).await;
    let began = tokio::time::Instant::now();
    for number in 0..5 {
        served(&mut client, &mut server, &find(number)).await;
    }
    assert!(began.elapsed() >= Duration::from_millis(200), "{:?}", began.elapsed());
    let status = stage.handle.rules().rules.remove(0);
    assert_eq!((status.matched, status.refused), (5, 0));
    assert!(status.waited >= 1, "{status:?}");
}

#[tokio::test]
async fn whom_the_server_refuses_anyway_takes_nothing_from_those_whom_it_serves() {
    let stage = stage(rules([Rule::new("once", [Action::LimitRate(RateRule::new(0.001, 1))])])).await;
    let (mut stranger, mut server) = stage.connect().await;
    stranger.write_all(&find(1)).await.unwrap();
    let (header, asked) = soon(whole_message(&mut server)).await;
    assert!(body_of(&asked).contains_key("listDatabases"));
    server.write_all(&message(9, header.request_id, 0, &doc! { "ok": 0.0, "code": 13 })).await.unwrap();
    for number in 1..4 {
        // The server says so itself, and it is not asked again.
        if number > 1 {
            stranger.write_all(&find(number)).await.unwrap();
        }
        assert_eq!(soon(whole_message(&mut server)).await.1, find(number));
        server.write_all(&message(9, number, 0, &doc! { "ok": 0.0, "code": 13 })).await.unwrap();
        refused(&mut stranger, number).await;
    }
    // Of half a message nothing is known.
    let (mut half, mut half_server) = stage.connect().await;
    half.write_all(&find(1)[..find(1).len() - 1]).await.unwrap();
    let (mut client, mut server) = stage.connect().await;
    log_in(&mut client, &mut server).await;
    served(&mut client, &mut server, &find(2)).await;
    drop(half);
    assert!(soon(rest(&mut half_server)).await.is_empty());
}

#[tokio::test]
async fn nobody_waits_for_longer_than_the_own_time_allows() {
    let limit = RateRule::new(0.1, 1).waiting(Duration::from_secs(60));
    let stage = stage(rules([Rule::new("evenly", [Action::LimitRate(limit)])])).await;
    let (mut client, mut server) = stage.connect().await;
    log_in(&mut client, &mut server).await;
    served(&mut client, &mut server, &find(1)).await;
    client.write_all(&message(2, 0, 0, &doc! { "find": "orders", "maxTimeMS": 50, "$db": "shop" })).await.unwrap();
    let answer = refused(&mut client, 2).await;
    assert_eq!(why(&answer), (50, "MaxTimeMSExpired"));
    assert!(!answer.contains_key("errorLabels"));
}

#[tokio::test]
async fn only_so_many_are_under_way_at_once_and_the_next_comes_when_one_is_answered() {
    let limit = ConcurrencyRule::new(1).waiting(Duration::from_secs(30));
    let stage = stage(rules([Rule::new("one", [Action::LimitConcurrency(limit)])])).await;
    let (mut first, mut first_server) = stage.connect().await;
    log_in(&mut first, &mut first_server).await;
    let (mut second, mut second_server) = stage.connect().await;
    log_in(&mut second, &mut second_server).await;
    first.write_all(&find(1)).await.unwrap();
    soon(whole_message(&mut first_server)).await;
    second.write_all(&find(2)).await.unwrap();
    let mut byte = [0];
    let early = tokio::time::timeout(Duration::from_millis(300), second_server.peek(&mut byte)).await;
    assert!(early.is_err(), "two are under way");
    first_server.write_all(&message(9, 1, 0, &doc! { "ok": 1 })).await.unwrap();
    assert_eq!(soon(whole_message(&mut second_server)).await.1, find(2));
    // Who waits and goes away gives up the place in the queue, and its connection ends.
    first.write_all(&find(3)).await.unwrap();
    drop(first);
    assert!(soon(rest(&mut first_server)).await.is_empty());
    second_server.write_all(&message(9, 2, 0, &doc! { "ok": 1 })).await.unwrap();
    soon(whole_message(&mut second)).await;
    served(&mut second, &mut second_server, &find(4)).await;
    assert_eq!(stage.handle.rules().rules[0].waited, 1);
}

#[tokio::test]
async fn who_finds_no_place_is_refused_and_a_connection_that_breaks_gives_its_own_back() {
    let stage = stage(rules([Rule::new("one", [Action::LimitConcurrency(ConcurrencyRule::new(1))])])).await;
    let (mut first, mut first_server) = stage.connect().await;
    log_in(&mut first, &mut first_server).await;
    let (mut second, mut second_server) = stage.connect().await;
    log_in(&mut second, &mut second_server).await;
    first.write_all(&find(1)).await.unwrap();
    soon(whole_message(&mut first_server)).await;
    second.write_all(&find(2)).await.unwrap();
    assert_eq!(refused(&mut second, 2).await.get_i32("code").unwrap(), 462);
    drop(first_server);
    assert!(soon(rest(&mut first)).await.is_empty());
    served(&mut second, &mut second_server, &find(3)).await;
}

#[tokio::test]
async fn time_is_clamped_and_a_comment_is_given_and_all_else_stays_as_it_was() {
    let clamps = Rule::new("tags", [Action::ClampMaxTime(Duration::from_secs(2)), Action::Tag("by the proxy".to_owned())]);
    let stage = stage(rules([clamps])).await;
    let (mut client, mut server) = stage.connect().await;
    log_in(&mut client, &mut server).await;
    let cases = [
        (doc! { "find": "c", "$db": "d" }, doc! { "find": "c", "$db": "d", "maxTimeMS": 2000_i64, "comment": "by the proxy" }),
        (
            doc! { "find": "c", "maxTimeMS": 5000, "$db": "d" },
            doc! { "find": "c", "$db": "d", "maxTimeMS": 2000_i64, "comment": "by the proxy" },
        ),
        (
            doc! { "find": "c", "maxTimeMS": 0, "$db": "d" },
            doc! { "find": "c", "$db": "d", "maxTimeMS": 2000_i64, "comment": "by the proxy" },
        ),
        (
            doc! { "find": "c", "maxTimeMS": 1, "comment": { "own": 1 }, "$db": "d" },
            doc! { "find": "c", "maxTimeMS": 1, "comment": { "own": 1 }, "$db": "d" },
        ),
    ];
    for (number, (asked, expected)) in (2..).zip(cases) {
        let seen = served(&mut client, &mut server, &message(number, 0, 0, &asked)).await;
        assert_eq!(body_of(&seen), expected);
    }
    // In a message with a checksum and a sequence, which may be large.
    for documents in [3, 3000] {
        let documents: Vec<Document> = (0..documents).map(|number| doc! { "_id": number, "text": "x".repeat(100) }).collect();
        let insert = with_sequence(9, CHECKSUM_PRESENT, &doc! { "insert": "c", "$db": "d" }, "documents", &documents);
        let seen = served(&mut client, &mut server, &insert).await;
        let expected = doc! { "insert": "c", "$db": "d", "maxTimeMS": 2000_i64, "comment": "by the proxy" };
        assert!(seen == with_sequence(9, 0, &expected, "documents", &documents), "{} bytes", seen.len());
    }
    // Nothing is asked about what goes on.
    let more = message(10, 0, 0, &doc! { "getMore": 7_i64, "collection": "c", "$db": "d" });
    assert_eq!(served(&mut client, &mut server, &more).await, more);
}

#[tokio::test]
async fn what_comes_compressed_is_judged_and_changed_as_well() {
    let stage = stage(rules([
        Rule::new("no", [Action::Deny(Denial::Unauthorized)]).with_match(Match::default().namespaces(["d.secret"])),
        Rule::new("tags", [Action::Tag("by the proxy".to_owned())]),
    ]))
    .await;
    let (mut client, mut server) = stage.connect().await;
    served(&mut client, &mut server, &ping(1)).await;
    client.write_all(&compressed(&message(2, 0, 0, &doc! { "find": "secret", "$db": "d" }))).await.unwrap();
    assert_eq!(refused(&mut client, 2).await.get_i32("code").unwrap(), 13);
    let seen = served(&mut client, &mut server, &compressed(&message(3, 0, 0, &doc! { "find": "open", "$db": "d" }))).await;
    assert_eq!(body_of(&seen), doc! { "find": "open", "$db": "d", "comment": "by the proxy" });
    // Nobody awaits an answer to this.
    client.write_all(&compressed(&message(4, 0, MORE_TO_COME, &doc! { "insert": "secret", "$db": "d" }))).await.unwrap();
    client.write_all(&compressed(&message(5, 0, 0, &doc! { "find": "secret", "$db": "d" }))).await.unwrap();
    assert_eq!(refused(&mut client, 5).await.get_i32("code").unwrap(), 13);
}

#[tokio::test]
async fn a_bulk_write_is_judged_by_the_namespaces_that_come_at_its_end() {
    let stage = stage(rules([
        Rule::new("no", [Action::Deny(Denial::Unauthorized)]).with_match(Match::default().namespaces(["d.secret"]))
    ]))
    .await;
    let (mut client, mut server) = stage.connect().await;
    log_in(&mut client, &mut server).await;
    let bulk = |number: i32, into: &str, documents: usize| {
        let operations: Vec<_> =
            (0..documents).map(|id| doc! { "insert": 0, "document": { "_id": id as i64, "t": "x".repeat(1000) } }).collect();
        let mut bulk = with_sequence(number, 0, &doc! { "bulkWrite": 1, "$db": "admin" }, "ops", &operations);
        add_sequence(&mut bulk, "nsInfo", &[doc! { "ns": into }]);
        bulk
    };
    for documents in [1, 2000] {
        let secret = bulk(2, "d.secret", documents);
        client.write_all(&secret).await.unwrap();
        assert_eq!(refused(&mut client, 2).await.get_i32("code").unwrap(), 13);
        let open = bulk(3, "d.open", documents);
        let (sent, seen) = tokio::join!(client.write_all(&open), soon(whole_message(&mut server)));
        sent.unwrap();
        assert!(seen.1 == open);
        server.write_all(&message(9, 3, 0, &doc! { "ok": 1 })).await.unwrap();
        soon(whole_message(&mut client)).await;
    }
}

#[tokio::test]
async fn other_rules_are_in_force_at_once_and_those_that_are_not_fit_change_nothing() {
    let stage = stage(|_| {}).await;
    let (mut client, mut server) = stage.connect().await;
    served(&mut client, &mut server, &find(1)).await;
    let no = Rules::new([Rule::new("no", [Action::Deny(Denial::Unauthorized)])]);
    assert_eq!(stage.handle.set_rules(&no).unwrap(), 2);
    client.write_all(&find(2)).await.unwrap();
    refused(&mut client, 2).await;
    assert!(stage.handle.set_rules(&Rules::new([Rule::new("", [Action::Allow])])).is_err());
    assert_eq!((stage.handle.rules().version, stage.handle.rules().to_rules()), (2, no));
    client.write_all(&find(3)).await.unwrap();
    refused(&mut client, 3).await;
    assert_eq!(stage.handle.set_rules(&Rules::default()).unwrap(), 3);
    served(&mut client, &mut server, &find(4)).await;
}

#[tokio::test]
async fn who_is_logged_in_the_server_is_asked() {
    let stage =
        stage(rules([Rule::new("no", [Action::Deny(Denial::Unauthorized)]).with_match(Match::default().users(["admin.ada"]))]))
            .await;
    let (mut client, mut server) = stage.connect().await;
    served(&mut client, &mut server, &find(1)).await;
    // Two steps, of which the first proves nothing.
    for (number, is_done) in [(2, false), (3, true)] {
        client.write_all(&message(number, 0, 0, &doc! { "saslContinue": 1, "$db": "admin" })).await.unwrap();
        soon(whole_message(&mut server)).await;
        server.write_all(&message(9, number, 0, &doc! { "done": is_done, "ok": 1 })).await.unwrap();
        soon(whole_message(&mut client)).await;
    }
    client.write_all(&find(4)).await.unwrap();
    // The question of the proxy's own; once more for a server that wants to hear a version.
    for (answer, expected) in [
        (doc! { "ok": 0, "code": 498_870 }, doc! { "connectionStatus": 1, "$db": "admin" }),
        (
            doc! { "authInfo": { "authenticatedUsers": [{ "user": "ada", "db": "admin" }] }, "ok": 1 },
            doc! { "connectionStatus": 1, "$db": "admin", "apiVersion": "1" },
        ),
    ] {
        let (header, asked) = soon(whole_message(&mut server)).await;
        assert_eq!(body_of(&asked), expected);
        server.write_all(&message(9, header.request_id, 0, &answer)).await.unwrap();
    }
    assert_eq!(refused(&mut client, 4).await.get_i32("code").unwrap(), 13);
    assert_eq!(stage.handle.connections()[0].users, ["admin.ada"]);
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

#[tokio::test]
async fn nobody_is_let_through_after_a_delay_that_is_longer_than_the_own_time() {
    let stage = stage(rules([Rule::new("slow", [Action::Delay(Duration::from_millis(200))])])).await;
    let (mut client, mut server) = stage.connect().await;
    client.write_all(&message(1, 0, 0, &doc! { "find": "c", "maxTimeMS": 100, "$db": "d" })).await.unwrap();
    assert_eq!(why(&refused(&mut client, 1).await).0, 50);
    served(&mut client, &mut server, &message(2, 0, 0, &doc! { "find": "c", "maxTimeMS": 60_000, "$db": "d" })).await;
}

#[tokio::test]
async fn a_login_that_awaits_no_answer_is_one_all_the_same() {
    let stage = stage(|_| {}).await;
    let (mut client, mut server) = stage.connect().await;
    served(&mut client, &mut server, &ping(1)).await;
    for (command, users) in [("saslContinue", vec!["admin.ada"]), ("logout", vec![])] {
        client.write_all(&message(2, 0, MORE_TO_COME, &doc! { command: 1, "$db": "admin" })).await.unwrap();
        assert_eq!(soon(whole_message(&mut server)).await.0.request_id, 2);
        let (header, _) = soon(whole_message(&mut server)).await;
        let named: Vec<Document> = users.iter().map(|_| doc! { "user": "ada", "db": "admin" }).collect();
        server
            .write_all(&message(9, header.request_id, 0, &doc! { "authInfo": { "authenticatedUsers": named }, "ok": 1 }))
            .await
            .unwrap();
        served(&mut client, &mut server, &ping(3)).await;
        assert_eq!(stage.handle.connections()[0].users, users);
    }
}

#[tokio::test]
async fn what_would_be_too_long_with_a_comment_is_passed_on_as_it_is() {
    let stage = stage(rules([Rule::new("tags", [Action::Tag("x".repeat(1000))])])).await;
    let (mut client, mut server) = stage.connect().await;
    log_in(&mut client, &mut server).await;
    let empty = with_sequence(2, 0, &doc! { "insert": "c", "$db": "d" }, "documents", &[]).len();
    let document = |length: usize| doc! { "t": "x".repeat(length - doc! { "t": "" }.to_vec().unwrap().len()) };
    // As long as can be, to the byte.
    let (mut documents, mut left) = (Vec::new(), 48_000_000 - empty);
    while left > 0 {
        let length = if left < 20_000_000 { left } else { 10_000_000 }.min(16_000_000);
        documents.push(document(length));
        left -= length;
    }
    let insert = with_sequence(2, 0, &doc! { "insert": "c", "$db": "d" }, "documents", &documents);
    assert_eq!(insert.len(), 48_000_000);
    let (sent, (_, seen)) = tokio::join!(client.write_all(&insert), soon(whole_message(&mut server)));
    sent.unwrap();
    assert!(seen == insert);
}

#[tokio::test]
async fn large_messages_are_of_those_whom_the_server_serves() {
    let stage = stage(|_| {}).await;
    for (answer, is_welcome) in [(doc! { "ok": 0, "code": 13 }, false), (doc! { "databases": [], "ok": 1 }, true)] {
        let (mut client, mut server) = stage.connect().await;
        served(&mut client, &mut server, &ping(1)).await;
        let large = message(2, 0, 0, &doc! { "insert": "x".repeat(100_000), "$db": "d" });
        let asked = async {
            let (header, asked) = soon(whole_message(&mut server)).await;
            assert!(body_of(&asked).contains_key("listDatabases"));
            server.write_all(&message(1000, header.request_id, 0, &answer)).await.unwrap();
        };
        let (_may_be_reset, ()) = tokio::join!(client.write_all(&large), asked);
        if is_welcome {
            assert!(soon(whole_message(&mut server)).await.1 == large);
            server.write_all(&message(9, 2, 0, &doc! { "ok": 1 })).await.unwrap();
            soon(whole_message(&mut client)).await;
            // And it is not asked again.
            let again = message(3, 0, 0, &doc! { "insert": "x".repeat(100_000), "$db": "d" });
            let (sent, (_, seen)) = tokio::join!(client.write_all(&again), soon(whole_message(&mut server)));
            sent.unwrap();
            assert!(seen == again);
        } else {
            assert!(soon(rest(&mut server)).await.is_empty());
            assert_eq!(stage.malformed("first"), Some(1));
        }
    }
}

#[tokio::test]
async fn large_messages_share_their_memory_and_who_gets_none_in_time_is_sent_away() {
    let stage = stage(|settings| {
        settings.large_messages_bytes = 0;
        settings.message_within = Duration::from_secs(2);
    })
    .await;
    // Of 96 MiB each wants the most that there is, and sends next to nothing of it.
    let mut begins = Vec::new();
    Header { length: 48_000_000, request_id: 2, response_to: 0, opcode: Opcode::Compressed }.write(&mut begins);
    begins.extend(2013_i32.to_le_bytes());
    begins.extend(47_000_000_i32.to_le_bytes());
    begins.push(1);
    let mut all = Vec::new();
    for _ in 0..3 {
        let (mut client, mut server) = stage.connect().await;
        log_in(&mut client, &mut server).await;
        client.write_all(&begins).await.unwrap();
        all.push((client, server));
    }
    let taken = async {
        while stage.handle.statistics().large_messages_bytes == 0 {
            tokio::task::yield_now().await;
        }
    };
    soon(taken).await;
    assert!((95_000_000..=96 << 20).contains(&stage.handle.statistics().large_messages_bytes));
    // Who needs none is served meanwhile.
    let (mut other, mut other_server) = stage.connect().await;
    served(&mut other, &mut other_server, &ping(1)).await;
    for (mut client, mut server) in all {
        assert!(soon(rest(&mut client)).await.is_empty() && soon(rest(&mut server)).await.is_empty());
    }
    assert_eq!(stage.handle.statistics().large_messages_bytes, 0);
}

#[tokio::test]
async fn who_does_not_read_is_sent_away_and_nothing_is_kept_for_them() {
    let stage = stage(|settings| settings.message_within = Duration::from_secs(1)).await;
    let (mut client, mut server) = stage.connect().await;
    client.write_all(&ping(1)).await.unwrap();
    soon(whole_message(&mut server)).await;
    let large = message(9, 1, 0, &doc! { "text": "x".repeat(12_000_000), "ok": 1 });
    // The server is made to wait, and then it is told that nobody takes it.
    let sent = soon(async {
        let mut sent = 0;
        for _ in 0..4 {
            match server.write_all(&large).await {
                Ok(()) => sent += 1,
                Err(_) => break,
            }
        }
        sent
    })
    .await;
    assert!(sent < 4, "all of it was taken");
    let gone = async {
        while !stage.handle.connections().is_empty() {
            tokio::task::yield_now().await;
        }
    };
    soon(gone).await;
}

#[tokio::test]
async fn a_request_whose_connection_fails_is_logged() {
    let stage = stage(|_| {}).await;
    let (mut client, mut server) = stage.connect().await;
    client.write_all(&find(1)).await.unwrap();
    soon(whole_message(&mut server)).await;
    drop(server);
    assert!(soon(rest(&mut client)).await.is_empty());
    let logged = stage.handle.requests().remove(0);
    assert_eq!((logged.command.as_str(), logged.refused), ("find", None));
    assert!(logged.failed.is_some());
}

#[tokio::test]
async fn names_that_nobody_has_are_not_kept() {
    let stage = stage(rules([Rule::new("no", [Action::Deny(Denial::ReadOnly)])])).await;
    let (mut client, mut server) = stage.connect().await;
    let hello = doc! { "hello": 1, "client": { "application": { "name": "x".repeat(10_000) } }, "$db": "admin" };
    served(&mut client, &mut server, &message(1, 0, 0, &hello)).await;
    log_in(&mut client, &mut server).await;
    client.write_all(&message(2, 0, 0, &doc! { "find": "ä".repeat(100_000), "$db": "d" })).await.unwrap();
    refused(&mut client, 2).await;
    client.write_all(&message(3, 0, 0, &doc! { "x".repeat(100_000): 1, "$db": "d" })).await.unwrap();
    refused(&mut client, 3).await;
    assert_eq!(stage.handle.connections()[0].application, None);
    for logged in stage.handle.requests() {
        assert!(
            logged.command.len() <= 255 && logged.namespace.len() <= 320,
            "{} {}",
            logged.command.len(),
            logged.namespace.len()
        );
    }
}

#[tokio::test]
async fn one_request_in_so_many_is_logged_and_nobody_is_named_who_must_not_be() {
    let stage = stage(|settings| {
        settings.request_log.one_in = 3;
        settings.request_log.hides_who = true;
    })
    .await;
    let (mut client, mut server) = stage.connect().await;
    for number in 0..7 {
        served(
            &mut client,
            &mut server,
            &message(number, 0, 0, &doc! { "find": "orders", "filter": { "card": "4111" }, "$db": "shop" }),
        )
        .await;
    }
    let logged = stage.handle.requests();
    assert_eq!(logged.len(), 3);
    let first = &logged[0];
    assert_eq!((first.client, first.refused, first.namespace.as_str()), (None, None, "shop.orders"));
    assert!(first.request_bytes > 0 && first.reply_bytes > 0);
    assert!(!format!("{logged:?}{}", serde_json::to_string(&logged).unwrap()).contains("4111"));
    // And what takes long, all of it.
    let slow = RequestLog { slower_than: Some(Duration::ZERO), ..RequestLog::default() };
    assert_eq!(serde_json::from_str::<RequestLog>(&serde_json::to_string(&slow).unwrap()).unwrap(), slow);
    let stage = super::stage(|settings| settings.request_log = slow).await;
    let (mut client, mut server) = stage.connect().await;
    served(&mut client, &mut server, &find(1)).await;
    // Once the next is served, it is known what has become of the last.
    served(&mut client, &mut server, &ping(2)).await;
    assert_eq!(stage.handle.requests().len(), 1);
}

/// A message with a sequence behind its body, and with a checksum if the flags say so.
fn with_sequence(request_id: i32, flags: u32, body: &Document, name: &str, documents: &[Document]) -> Vec<u8> {
    let mut message = message(request_id, 0, flags, body);
    add_sequence(&mut message, name, documents);
    if flags & CHECKSUM_PRESENT != 0 {
        let length = i32::try_from(message.len() + 4).unwrap();
        message[..4].copy_from_slice(&length.to_le_bytes());
        let checksum = crc::Crc::<u32>::new(&crc::CRC_32_ISCSI).checksum(&message);
        message.extend(checksum.to_le_bytes());
    }
    message
}

fn add_sequence(message: &mut Vec<u8>, name: &str, documents: &[Document]) {
    let documents: Vec<u8> = documents.iter().flat_map(|document| document.to_vec().unwrap()).collect();
    message.push(1);
    message.extend(i32::try_from(4 + name.len() + 1 + documents.len()).unwrap().to_le_bytes());
    message.extend(name.as_bytes());
    message.push(0);
    message.extend(documents);
    let length = i32::try_from(message.len()).unwrap();
    message[..4].copy_from_slice(&length.to_le_bytes());
}

/// The same message in the compressed form, with Snappy.
fn compressed(plain: &[u8]) -> Vec<u8> {
    let header = Header::read(plain.first_chunk().unwrap()).unwrap();
    let inner = &plain[HEADER..];
    let packed = snap::raw::Encoder::new().compress_vec(inner).unwrap();
    let mut message = Vec::new();
    Header { length: HEADER + 9 + packed.len(), opcode: Opcode::Compressed, ..header }.write(&mut message);
    message.extend(2013_i32.to_le_bytes());
    message.extend(i32::try_from(inner.len()).unwrap().to_le_bytes());
    message.push(1);
    message.extend(packed);
    message
}

#[test]
fn a_document_is_changed_where_it_should_be_and_nowhere_else() {
    use crate::wire::rewrite;
    let body = doc! { "find": "c", "a": [1, { "b": bson::Bson::Null }], "maxTimeMS": 3, "r": bson::Regex { pattern: "x".try_into().unwrap(), options: "i".try_into().unwrap() }, "s": bson::JavaScriptCodeWithScope { code: "c".to_owned(), scope: doc! { "z": 1 } }, "$db": "d" };
    let raw = RawDocumentBuf::try_from(&body).unwrap();
    assert_eq!(rewrite::document(&raw, &[], &RawDocumentBuf::new()).unwrap(), raw);
    let changed = rewrite::command(&raw, Some(Duration::from_millis(7)), None).unwrap();
    let mut expected = body;
    expected.remove("maxTimeMS");
    expected.insert("maxTimeMS", 7_i64);
    assert_eq!(Document::try_from(changed.as_ref()).unwrap(), expected);
}

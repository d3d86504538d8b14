//! What becomes of requests that rules have something to say about.

use super::*;

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
async fn nobody_is_let_through_after_a_delay_that_is_longer_than_the_own_time() {
    let stage = stage(rules([Rule::new("slow", [Action::Delay(Duration::from_millis(200))])])).await;
    let (mut client, mut server) = stage.connect().await;
    client.write_all(&message(1, 0, 0, &doc! { "find": "c", "maxTimeMS": 100, "$db": "d" })).await.unwrap();
    assert_eq!(why(&refused(&mut client, 1).await).0, 50);
    served(&mut client, &mut server, &message(2, 0, 0, &doc! { "find": "c", "maxTimeMS": 60_000, "$db": "d" })).await;
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

//! What passes, and what does not.

use super::*;

#[tokio::test]
async fn requests_and_replies_pass_as_they_are() {
    let stage = stage(|_| {}).await;
    let (mut client, mut server) = stage.connect().await;
    for number in 1..20 {
        let request = ping(number);
        // In pieces of any size.
        for piece in request.chunks(usize::try_from(number).unwrap()) {
            client.write_all(piece).await.unwrap();
        }
        assert_eq!(soon(whole_message(&mut server)).await.1, request);
        let answer = message(number + 1000, number, 0, &doc! { "ok": 1, "text": "x".repeat(100_000) });
        let (sent, received) = tokio::join!(server.write_all(&answer), soon(whole_message(&mut client)));
        sent.unwrap();
        assert_eq!(received.1, answer);
    }
    // Nobody waits for an answer to this one.
    client.write_all(&message(50, 0, MORE_TO_COME, &doc! { "insert": "c", "$db": "d" })).await.unwrap();
    client.write_all(&ping(51)).await.unwrap();
    assert_eq!(soon(whole_message(&mut server)).await.0.request_id, 50);
    assert_eq!(soon(whole_message(&mut server)).await.0.request_id, 51);
}

#[tokio::test]
async fn replies_that_follow_each_other_pass_until_the_last() {
    let stage = stage(|_| {}).await;
    let (mut client, mut server) = stage.connect().await;
    client.write_all(&message(1, 0, EXHAUST_ALLOWED, &doc! { "getMore": 1_i64, "$db": "d" })).await.unwrap();
    soon(whole_message(&mut server)).await;
    for (id, to, flags) in [(10, 1, MORE_TO_COME), (11, 10, MORE_TO_COME), (12, 11, 0)] {
        server.write_all(&message(id, to, flags, &doc! { "ok": 1 })).await.unwrap();
        assert_eq!(soon(whole_message(&mut client)).await.0.request_id, id);
    }
    client.write_all(&ping(2)).await.unwrap();
    assert_eq!(soon(whole_message(&mut server)).await.0.request_id, 2);
}

#[tokio::test]
async fn of_what_is_no_message_the_server_never_has_the_end() {
    let stage = stage(|_| {}).await;
    let good = ping(7);
    let body = HEADER + 5;
    type Change<'a> = &'a dyn Fn(&mut Vec<u8>);
    let changes: [(&str, Change<'_>); 8] = [
        ("length", &|message| message[..4].copy_from_slice(&i32::MAX.to_le_bytes())),
        ("length", &|message| message[..4].copy_from_slice(&(-5_i32).to_le_bytes())),
        ("opcode", &|message| message[12..16].copy_from_slice(&1_i32.to_le_bytes())),
        ("flags", &|message| message[16] = 4),
        ("section", &|message| message[20] = 9),
        ("bounds", &|message| message[body] ^= 0x40),
        ("bson", &|message| message[body + 4] = 0x55),
        ("checksum", &|message| {
            message[16] = 1;
            message.extend([0; 4]);
            let length = i32::try_from(message.len()).unwrap();
            message[..4].copy_from_slice(&length.to_le_bytes());
        }),
    ];
    for (reason, change) in changes {
        let before = stage.malformed(reason).unwrap();
        let (mut client, mut server) = stage.connect().await;
        let mut bad = good.clone();
        change(&mut bad);
        client.write_all(&bad).await.unwrap();
        let seen = soon(rest(&mut server)).await;
        assert!(seen.len() < bad.len(), "{reason}: the server has seen {} of {}", seen.len(), bad.len());
        soon(rest(&mut client)).await;
        assert_eq!(stage.malformed(reason), Some(before + 1), "{reason}");
    }
    // Others feel nothing.
    let (mut client, mut server) = stage.connect().await;
    client.write_all(&good).await.unwrap();
    assert_eq!(soon(whole_message(&mut server)).await.1, good);
}

#[tokio::test]
async fn of_a_large_message_that_turns_out_to_be_none_the_end_is_held_back() {
    let stage = stage(|_| {}).await;
    let (mut client, mut server) = stage.connect().await;
    log_in(&mut client, &mut server).await;
    let mut bad = message(3, 0, 0, &doc! { "insert": "c", "$db": "d" });
    let documents: Vec<u8> =
        (0..2000).flat_map(|number| doc! { "_id": number, "text": "x".repeat(1000) }.to_vec().unwrap()).collect();
    bad.push(1);
    bad.extend(i32::try_from(4 + 10 + documents.len()).unwrap().to_le_bytes());
    bad.extend(b"documents\0");
    bad.extend(documents);
    let length = i32::try_from(bad.len()).unwrap();
    bad[..4].copy_from_slice(&length.to_le_bytes());
    // The end of the last document.
    *bad.last_mut().unwrap() = 1;
    let (_, seen) = tokio::join!(client.write_all(&bad), soon(rest(&mut server)));
    assert!(seen.len() > 1_000_000 && seen.len() < bad.len(), "{} of {}", seen.len(), bad.len());
    assert_eq!(seen, bad[..seen.len()]);
    let (_, reply) = soon(whole_message(&mut client)).await;
    assert_eq!(Document::from_reader(&reply[21..]).unwrap().get_i32("code").unwrap(), 22);
}

#[tokio::test]
async fn a_server_that_breaks_off_is_a_connection_that_breaks_off() {
    let stage = stage(|_| {}).await;
    let (mut client, mut server) = stage.connect().await;
    client.write_all(&ping(1)).await.unwrap();
    soon(whole_message(&mut server)).await;
    let answer = message(2, 1, 0, &doc! { "ok": 1 });
    server.write_all(&answer[..20]).await.unwrap();
    drop(server);
    assert_eq!(soon(rest(&mut client)).await, answer[..20]);
    // An answer to something else is none.
    let (mut client, mut server) = stage.connect().await;
    client.write_all(&ping(1)).await.unwrap();
    soon(whole_message(&mut server)).await;
    server.write_all(&message(2, 99, 0, &doc! { "ok": 1 })).await.unwrap();
    assert!(soon(rest(&mut client)).await.is_empty());
}

#[tokio::test]
async fn a_client_that_goes_takes_its_server_connection_with_it() {
    let stage = stage(|_| {}).await;
    let (client, mut server) = stage.connect().await;
    drop(client);
    assert!(soon(rest(&mut server)).await.is_empty());
    // Also while the server is at work.
    let (mut client, mut server) = stage.connect().await;
    client.write_all(&ping(1)).await.unwrap();
    soon(whole_message(&mut server)).await;
    drop(client);
    assert!(soon(rest(&mut server)).await.is_empty());
    server.write_all(&message(2, 1, 0, &doc! { "ok": 0, "code": 279 })).await.unwrap();
    soon(nobody(&stage)).await;
}

#[tokio::test]
async fn who_says_that_nothing_more_comes_has_the_answers_to_all_that_came() {
    let stage = stage(|_| {}).await;
    let (mut client, mut server) = stage.connect().await;
    client.write_all(&[ping(1), ping(2)].concat()).await.unwrap();
    client.shutdown().await.unwrap();
    for number in [1, 2] {
        assert_eq!(soon(whole_message(&mut server)).await.0.request_id, number);
        if number == 2 {
            // It is told while it is at work on the last, so that it may end it.
            assert!(soon(rest(&mut server)).await.is_empty());
        }
        server.write_all(&message(9, number, 0, &doc! { "ok": 1 })).await.unwrap();
        assert_eq!(soon(whole_message(&mut client)).await.0.response_to, number);
    }
    assert!(soon(rest(&mut client)).await.is_empty());
}

#[tokio::test]
async fn nobody_waits_for_ever_with_a_client_of_which_nothing_more_comes() {
    let limited =
        Rule::new("often", [Action::LimitRate(RateRule::new(1.0, 100))]).with_match(Match::default().commands(["find"]));
    let with_rule = rules([limited]);
    let stage = stage(|settings| {
        with_rule(settings);
        settings.message_within = Duration::from_millis(300);
    })
    .await;
    // A request; one and the beginning of another; two; one before which the server is asked who that is. It never answers.
    for sent in [ping(1), [&ping(1)[..], b"x"].concat(), [ping(1), ping(2)].concat(), find(1)] {
        let (mut client, mut server) = stage.connect().await;
        client.write_all(&sent).await.unwrap();
        soon(whole_message(&mut server)).await;
        client.shutdown().await.unwrap();
        assert!(soon(rest(&mut client)).await.is_empty());
        assert!(soon(rest(&mut server)).await.is_empty());
    }
    soon(nobody(&stage)).await;
}

#[tokio::test]
async fn what_can_never_be_a_whole_request_is_none() {
    let stage = stage(|_| {}).await;
    let (mut client, mut server) = stage.connect().await;
    let mut sent = ping(1);
    Header { length: 100 << 10, request_id: 2, response_to: 0, opcode: Opcode::Message }.write(&mut sent);
    client.write_all(&sent).await.unwrap();
    client.shutdown().await.unwrap();
    soon(whole_message(&mut server)).await;
    assert!(soon(rest(&mut server)).await.is_empty());
    server.write_all(&message(9, 1, 0, &doc! { "ok": 1 })).await.unwrap();
    assert_eq!(soon(whole_message(&mut client)).await.0.response_to, 1);
    assert!(soon(rest(&mut client)).await.is_empty());
    soon(nobody(&stage)).await;
    assert_eq!(stage.ended("server_failed"), Some(0));
}

#[tokio::test]
async fn a_server_that_goes_when_nothing_more_comes_has_not_failed() {
    let stage = stage(|_| {}).await;
    // It goes instead of answering, and in the middle of it.
    for (half, failed) in [(0, 0), (20, 1)] {
        let (mut client, mut server) = stage.connect().await;
        client.write_all(&ping(1)).await.unwrap();
        soon(whole_message(&mut server)).await;
        client.shutdown().await.unwrap();
        assert!(soon(rest(&mut server)).await.is_empty());
        let answer = message(2, 1, 0, &doc! { "ok": 1 });
        server.write_all(&answer[..half]).await.unwrap();
        drop(server);
        assert_eq!(soon(rest(&mut client)).await, answer[..half]);
        soon(nobody(&stage)).await;
        assert_eq!(stage.ended("server_failed"), Some(failed), "{half}");
    }
}

#[tokio::test]
async fn replies_without_an_end_end_when_nothing_more_comes() {
    let stage = stage(|settings| settings.message_within = Duration::from_secs(3600)).await;
    let (mut client, mut server) = stage.connect().await;
    client.write_all(&message(1, 0, EXHAUST_ALLOWED, &doc! { "hello": 1, "$db": "admin" })).await.unwrap();
    soon(whole_message(&mut server)).await;
    server.write_all(&message(2, 1, MORE_TO_COME, &doc! { "ok": 1 })).await.unwrap();
    soon(whole_message(&mut client)).await;
    client.shutdown().await.unwrap();
    assert!(soon(rest(&mut client)).await.is_empty());
    soon(nobody(&stage)).await;
}

/// Waits until nobody is connected.
async fn nobody(stage: &Stage) {
    while !stage.handle.connections().is_empty() {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn who_sends_too_slowly_or_too_much_too_early_is_sent_away() {
    let stage = stage(|settings| settings.message_within = Duration::from_millis(300)).await;
    for half in [0, 3, HEADER, HEADER + 9] {
        let (mut client, mut server) = stage.connect().await;
        client.write_all(&ping(1)[..half]).await.unwrap();
        assert!(soon(rest(&mut client)).await.is_empty(), "{half}");
        assert!(soon(rest(&mut server)).await.len() < ping(1).len());
    }
    // Who was answered before has no longer for the rest of what was begun.
    for half in [1, HEADER, HEADER + 9] {
        let (mut client, mut server) = stage.connect().await;
        answered(&mut client, &mut server, &ping(1), &doc! { "ok": 1 }).await;
        client.write_all(&ping(2)[..half]).await.unwrap();
        assert!(soon(rest(&mut client)).await.is_empty(), "{half}");
        assert!(soon(rest(&mut server)).await.is_empty(), "{half}");
    }
    let (mut client, _server) = stage.connect().await;
    let large = message(1, 0, 0, &doc! { "insert": "x".repeat(100_000), "$db": "d" });
    let _may_be_reset = client.write_all(&large).await;
    soon(rest(&mut client)).await;
    assert_eq!(stage.malformed("first"), Some(1));
    // Who has nothing to say may be silent for longer, once it was answered.
    let (mut client, mut server) = stage.connect().await;
    for number in [1, 2] {
        client.write_all(&ping(number)).await.unwrap();
        soon(whole_message(&mut server)).await;
        // The server may take its time as well.
        tokio::time::sleep(Duration::from_millis(700)).await;
        server.write_all(&message(9, number, 0, &doc! { "ok": 1 })).await.unwrap();
        soon(whole_message(&mut client)).await;
        tokio::time::sleep(Duration::from_millis(700)).await;
    }
}

#[tokio::test]
async fn who_sends_much_without_waiting_leaves_others_their_turns() {
    let denied = Rule::new("no", [Action::Deny(Denial::Unauthorized)]).with_match(Match::default().commands(["insert"]));
    let stage = stage(rules([denied])).await;
    let (mut client, mut server) = stage.connect().await;
    answered(&mut client, &mut server, &ping(1), &doc! { "ok": 1 }).await;
    let many = 2000;
    let all: Vec<u8> =
        (0..many).flat_map(|number| message(number, 0, MORE_TO_COME, &doc! { "insert": "c", "$db": "d" })).collect();
    client.write_all(&all).await.unwrap();
    let refused = || stage.metrics.counter_value("mongo_proxy_refused_total", &[("reason", "denied")]).unwrap();
    let turns = async {
        let mut turns = 0;
        while refused() < u64::try_from(many).unwrap() {
            turns += u32::from(refused() > 0);
            tokio::task::yield_now().await;
        }
        turns
    };
    // On this one thread, the session and this.
    let turns = soon(turns).await;
    assert!(turns >= 8, "{turns}");
}

#[tokio::test]
async fn there_are_only_so_many_connections() {
    let stage = stage(|settings| settings.max_connections = 2).await;
    let (first, _first_server) = stage.connect().await;
    let (_second, _second_server) = stage.connect().await;
    let mut third = TcpStream::connect(stage.proxy).await.unwrap();
    assert!(soon(rest(&mut third)).await.is_empty());
    drop(first);
    // Somebody has gone, so that there is a place again.
    let (accepted, mut told) = mpsc::channel::<()>(1);
    let (server, proxy) = (&stage.server, stage.proxy);
    let client = async {
        loop {
            let client = TcpStream::connect(proxy).await.unwrap();
            tokio::select! {
                () = accepted.closed() => break client,
                () = tokio::time::sleep(Duration::from_millis(20)) => drop(client),
            }
        }
    };
    let accepting = async {
        server.accept().await.unwrap();
        told.close();
    };
    soon(async { tokio::join!(client, accepting) }).await;
}

#[tokio::test]
async fn compressed_messages_pass_as_they_came_once_the_client_is_known() {
    let stage = stage(|_| {}).await;
    // Not compressed at all, but in the form of it.
    let compressed = |request_id: i32, says: i32| {
        let inner = &ping(request_id)[HEADER..];
        let header = Header { length: HEADER + 9 + inner.len(), request_id, response_to: 0, opcode: Opcode::Compressed };
        let mut message = Vec::new();
        header.write(&mut message);
        message.extend(2013_i32.to_le_bytes());
        message.extend((i32::try_from(inner.len()).unwrap() + says).to_le_bytes());
        message.push(0);
        message.extend(inner);
        message
    };
    let (mut stranger, mut server) = stage.connect().await;
    stranger.write_all(&compressed(1, 0)).await.unwrap();
    assert!(soon(rest(&mut server)).await.is_empty());
    assert_eq!(stage.malformed("first"), Some(1));
    let (mut client, mut server) = stage.connect().await;
    client.write_all(&ping(1)).await.unwrap();
    soon(whole_message(&mut server)).await;
    server.write_all(&message(2, 1, 0, &doc! { "ok": 1 })).await.unwrap();
    soon(whole_message(&mut client)).await;
    client.write_all(&compressed(3, 0)).await.unwrap();
    assert_eq!(soon(whole_message(&mut server)).await.1, compressed(3, 0));
    server.write_all(&message(4, 3, 0, &doc! { "ok": 1 })).await.unwrap();
    soon(whole_message(&mut client)).await;
    client.write_all(&compressed(5, 1)).await.unwrap();
    assert_eq!(soon(whole_message(&mut client)).await.0.response_to, 5);
    assert!(soon(rest(&mut server)).await.is_empty());
    assert_eq!(stage.malformed("compression"), Some(1));
}

#[tokio::test]
async fn who_awaits_no_answer_gets_no_refusal() {
    let stage = stage(|_| {}).await;
    let (mut client, mut server) = stage.connect().await;
    let mut bad = message(1, 0, MORE_TO_COME, &doc! { "insert": "c", "$db": "d" });
    *bad.last_mut().unwrap() = 1;
    client.write_all(&bad).await.unwrap();
    assert!(soon(rest(&mut client)).await.is_empty());
    soon(rest(&mut server)).await;
}

#[tokio::test]
async fn a_server_that_is_not_there_is_a_connection_that_ends() {
    let stage = stage(|_| {}).await;
    drop(stage.server);
    let mut client = TcpStream::connect(stage.proxy).await.unwrap();
    assert!(soon(rest(&mut client)).await.is_empty());
}

#[tokio::test]
async fn whatever_strangers_send_others_are_served() {
    let stage = stage(|_| {}).await;
    let (mut client, mut server) = stage.connect().await;
    let mut random = fastrand::Rng::with_seed(3);
    for number in 1..400 {
        let (mut stranger, mut strangers_server) = stage.connect().await;
        // Noise, a message with noise in it, or the half of one.
        let mut bytes = match number % 3 {
            0 => (0..random.usize(1..400)).map(|_| random.u8(..)).collect(),
            1 => {
                let mut bytes = ping(1);
                let at = random.usize(0..bytes.len());
                bytes[at] = random.u8(..);
                bytes
            }
            _ => ping(1),
        };
        if number % 3 == 2 {
            bytes.truncate(random.usize(0..bytes.len()));
        }
        let _may_be_cut_off = stranger.write_all(&bytes).await;
        let _may_be_cut_off = stranger.shutdown().await;
        let seen = soon(rest(&mut strangers_server)).await;
        assert!(bytes.starts_with(&seen));
        if seen.len() == bytes.len() && !seen.is_empty() {
            // So it was a message after all.
            let header = Header::read(seen.first_chunk().unwrap()).unwrap();
            assert_eq!(header.length, seen.len());
        }
        client.write_all(&ping(number)).await.unwrap();
        soon(whole_message(&mut server)).await;
        server.write_all(&message(number, number, 0, &doc! { "ok": 1 })).await.unwrap();
        soon(whole_message(&mut client)).await;
    }
}

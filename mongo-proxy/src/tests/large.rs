//! Messages that need more than a connection has for itself.

use super::*;

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

//! What is known and told of clients and their requests.

use super::*;

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
async fn who_is_logged_in_is_known_also_of_a_client_that_has_closed_its_half() {
    let stage =
        stage(rules([Rule::new("no", [Action::Deny(Denial::Unauthorized)]).with_match(Match::default().users(["admin.ada"]))]))
            .await;
    let (mut client, mut server) = stage.connect().await;
    let login = message(1, 0, 0, &doc! { "saslContinue": 1, "$db": "admin" });
    client.write_all(&[login, find(2)].concat()).await.unwrap();
    client.shutdown().await.unwrap();
    soon(whole_message(&mut server)).await;
    server.write_all(&message(9, 1, 0, &doc! { "done": true, "ok": 1 })).await.unwrap();
    soon(whole_message(&mut client)).await;
    let (header, asked) = soon(whole_message(&mut server)).await;
    assert_eq!(body_of(&asked), doc! { "connectionStatus": 1, "$db": "admin" });
    let users = doc! { "authInfo": { "authenticatedUsers": [{ "user": "ada", "db": "admin" }] }, "ok": 1 };
    server.write_all(&message(9, header.request_id, 0, &users)).await.unwrap();
    assert_eq!(refused(&mut client, 2).await.get_i32("code").unwrap(), 13);
    assert!(soon(rest(&mut server)).await.is_empty());
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

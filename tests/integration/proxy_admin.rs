//! P5, P8: what an operator sees of a proxy, and changes while it runs, over HTTP.

use std::time::Duration;

use mongo_core::{
    bson::{Document, doc},
    mongodb::Client,
};
use mongo_proxy::{ProxySettings, RequestLog, router};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::{proxy::listening, support::own};

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_sees_what_happens_and_changes_the_rules() {
    let (server, _) = own().await;
    let mut log = RequestLog::default();
    log.one_in = 1;
    let (_running, address, handle) = listening(ProxySettings::new(server.member(0).host_port()).with_request_log(log)).await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let admin = format!("http://{}/proxy", listener.local_addr().unwrap());
    let app = axum::Router::new().nest("/proxy", router(handle));
    let serving = tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
    let http = reqwest::Client::builder()
        .tls_backend_preconfigured(mongo_core::tls::client_config().unwrap())
        .timeout(Duration::from_secs(30))
        .build()
        .unwrap();
    let ask = async |method: Method, path: &str, body: String| -> (StatusCode, Value) {
        let answer = http.request(method, format!("{admin}{path}")).body(body).send().await.unwrap();
        let status = answer.status();
        (status, serde_json::from_str(&answer.text().await.unwrap()).unwrap_or(Value::Null))
    };
    let get = async |path: &str| ask(Method::GET, path, String::new()).await;

    let uri = format!("mongodb://{address}/?directConnection=true&appName=till");
    let orders = Client::with_uri_str(uri).await.unwrap().database("shop").collection::<Document>("orders");
    orders.insert_one(doc! { "card": "4111" }).await.unwrap();
    assert_eq!(get("/health").await.0, StatusCode::OK);
    let (_, statistics) = get("/api/statistics").await;
    assert!(statistics["connections"].as_u64() >= Some(2) && statistics["requests"].as_u64() >= Some(2), "{statistics:#}");
    let (_, connections) = get("/api/connections").await;
    assert!(connections.as_array().unwrap().iter().any(|connection| connection["application"] == "till"), "{connections:#}");
    let (_, requests) = get("/api/requests").await;
    let logged = requests.as_array().unwrap().last().unwrap();
    assert_eq!((&logged["command"], &logged["namespace"]), (&json!("insert"), &json!("shop.orders")));
    assert!(!requests.to_string().contains("4111"));

    let rules =
        json!({ "rules": [{ "name": "no", "match": { "namespaces": ["shop.*"] }, "actions": [{ "deny": "unauthorized" }] }] });
    let put = async |path: &str, body: &Value| ask(Method::PUT, path, body.to_string()).await;
    // What is only tried, or is not fit, changes nothing.
    assert_eq!(put("/api/rules?dry_run=true", &rules).await, (StatusCode::OK, json!({ "version": 1, "dry_run": true })));
    let (status, wrong) = put("/api/rules", &json!({ "rules": [{ "name": "no", "actions": ["denies"] }] })).await;
    assert!(status == StatusCode::BAD_REQUEST && wrong["error"].as_str().unwrap().contains("denies"), "{wrong}");
    orders.insert_one(doc! {}).await.unwrap();
    assert_eq!(put("/api/rules", &rules).await, (StatusCode::OK, json!({ "version": 2, "dry_run": false })));
    assert!(orders.insert_one(doc! {}).await.is_err());
    let (_, now) = get("/api/rules").await;
    assert_eq!(
        (&now["version"], &now["rules"][0]["rule"]["name"], &now["rules"][0]["refused"]),
        (&json!(2), &json!("no"), &json!(1))
    );
    // What is shown can be sent back.
    let shown = json!({ "rules": [now["rules"][0]["rule"]] });
    assert_eq!(put("/api/rules", &shown).await.1["version"], 3);
    // A browser can be made to send this by any page; it changes nothing.
    assert_eq!(ask(Method::POST, "/api/drain", String::new()).await.0, StatusCode::METHOD_NOT_ALLOWED);
    assert_eq!(get("/health").await.0, StatusCode::OK);
    assert_eq!(put("/api/drain", &Value::Null).await.1["is_draining"], true);
    let (status, health) = get("/health").await;
    assert_eq!((status, &health["status"]), (StatusCode::SERVICE_UNAVAILABLE, &json!("draining")));
    serving.abort();
}

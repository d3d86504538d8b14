//! P1, P3: other drivers than this one do their work through the proxy.
//!
//! Needs PyMongo with its compressors for the `python3` on the path (`pip install pymongo python-snappy zstandard`), and libmongoc with a C compiler (Debian's
//! `libmongoc-dev`, `gcc` and `pkg-config`).

use std::{
    path::{Path, PathBuf},
    process::Output,
};

use mongo_core::mongodb::Client;
use mongo_proxy::{Action, Denial, Match, ProxySettings, RateRule, Rule, Rules, Topology};
use mongo_testkit::TestDeployment;
use tokio::process::Command;

use crate::{proxy::listening, support::own};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("drivers")
}

/// Another driver's program, with what comes before the URI.
struct Driver {
    name: &'static str,
    program: Vec<PathBuf>,
    _built: Option<tempfile::TempDir>,
}

impl Driver {
    fn pymongo() -> Self {
        Self { name: "PyMongo", program: vec!["python3".into(), folder().join("work.py")], _built: None }
    }

    async fn libmongoc() -> Self {
        let built = tempfile::tempdir().unwrap();
        let program = built.path().join("work");
        let (from, to) = (folder().join("work.c"), &program);
        let build = format!("cc -Wall -O1 -o {} {} $(pkg-config --cflags --libs libmongoc-1.0)", to.display(), from.display());
        let output = Command::new("sh").arg("-c").arg(build).output().await.unwrap();
        assert!(
            output.status.success(),
            "install libmongoc-dev, gcc and pkg-config: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Self { name: "libmongoc", program: vec![program], _built: Some(built) }
    }

    async fn run(&self, arguments: &[&str]) {
        let Output { status, stderr, .. } =
            Command::new(&self.program[0]).args(&self.program[1..]).args(arguments).output().await.unwrap();
        let said = String::from_utf8_lossy(&stderr);
        assert!(status.success() && said.is_empty(), "{} {arguments:?}: {status}: {said}", self.name);
    }
}

async fn both() -> [Driver; 2] {
    [Driver::pymongo(), Driver::libmongoc().await]
}

#[tokio::test(flavor = "multi_thread")]
async fn other_drivers_do_their_work_with_every_compression() {
    let (server, _) = own().await;
    let (_running, address, handle) = listening(ProxySettings::new(server.member(0).host_port())).await;
    for driver in both().await {
        for compressor in ["", "&compressors=snappy", "&compressors=zlib", "&compressors=zstd"] {
            let before = handle.statistics().requests;
            driver.run(&[&format!("mongodb://{address}/?directConnection=true{compressor}")]).await;
            assert!(handle.statistics().requests > before + 100);
        }
    }
    assert!(handle.statistics().malformed.values().all(|number| *number == 0), "{:?}", handle.statistics());
}

#[tokio::test(flavor = "multi_thread")]
async fn other_drivers_do_their_work_as_with_a_load_balancer_and_with_a_replica_set() {
    let server = TestDeployment::replica_set(3).start().await.unwrap();
    let primary = server.member(server.primary().await.unwrap()).host_port();
    let (_running, balancer, _) = listening(ProxySettings::new(&primary)).await;
    let (_also_running, set, _) = listening(ProxySettings::new(&primary).with_topology(Topology::ReplicaSet)).await;
    for driver in both().await {
        driver.run(&[&format!("mongodb://{balancer}/?loadBalanced=true")]).await;
        // What was written is read from whoever has it, so that it must be with all of them.
        let uri = format!("mongodb://{set}/?replicaSet={}&w=majority", server.replica_set_name().unwrap());
        driver.run(&[&uri]).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn other_drivers_understand_refusals_as_this_one_does() {
    let (server, _) = own().await;
    let no = |name, matches| Rule::new(name, [Action::Deny(Denial::Unauthorized)]).with_match(matches);
    let rules = [
        no("secrets", Match::default().namespaces(["shop.secrets"])),
        no("silent", Match::default().namespaces(["shop.silent"]).commands(["insert"])),
        Rule::new("rare", [Action::LimitRate(RateRule::new(0.0001, 1))]).with_match(Match::default().namespaces(["shop.rare"])),
    ];
    for driver in both().await {
        let settings = ProxySettings::new(server.member(0).host_port()).with_rules(Rules::new(rules.clone()));
        let (_running, address, handle) = listening(settings).await;
        driver.run(&[&format!("mongodb://{address}/?directConnection=true"), "refused"]).await;
        assert!(handle.statistics().refused["denied"] >= 3);
        // One connection for the work, and those by which a driver watches.
        assert!(handle.statistics().connections_ever < 12, "{}: connections were dropped", driver.name);
    }
    let client = Client::with_uri_str(server.uri()).await.unwrap();
    let there = client.database("shop").list_collection_names().await.unwrap();
    assert!(there.is_empty(), "{there:?}");
}

//! A repository in a bucket, on a real S3 server in this process (B4).

use std::{
    convert::Infallible,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
};

use bytes::Bytes;
use hyper::{Method, Request, Response, StatusCode, body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto::Builder,
};
use mongo_backup::{
    ArchiveSink, Backup, Key, ObjectName, ObjectStoreArchive, Prune, PutMode, PutOutcome, Repository, Restore, RetentionPolicy,
    SnapshotChoice, Verify, conformance,
};
use mongo_core::ErrorKind;
use s3s::{Body, auth::SimpleAuth, service::S3ServiceBuilder};
use tokio::{net::TcpListener, sync::Mutex};

use crate::support::{db_hash, example, fill, own};

/// An S3 server over a folder, and what it does to requests before it serves them.
struct S3 {
    address: SocketAddr,
    faults: Arc<Faults>,
    _folder: tempfile::TempDir,
}

struct Faults {
    root: PathBuf,
    /// So many requests are answered with this status first.
    refuse: AtomicUsize,
    status: AtomicUsize,
    /// Whether conditions of puts are overlooked, as some servers do.
    overlook: AtomicBool,
    /// The server itself looks whether an object exists, and then writes it: one put at a time makes that atomic.
    puts: Mutex<()>,
}

impl S3 {
    async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(folder.path().join("backups")).unwrap();
        let faults = Arc::new(Faults {
            root: folder.path().to_owned(),
            refuse: AtomicUsize::new(0),
            status: AtomicUsize::new(0),
            overlook: AtomicBool::new(false),
            puts: Mutex::default(),
        });
        let address = serve(folder.path(), Arc::clone(&faults)).await;
        Self { address, faults, _folder: folder }
    }

    fn archive(&self, prefix: &str) -> ObjectStoreArchive {
        self.archive_as(prefix, "secret")
    }

    fn archive_as(&self, prefix: &str, secret: &str) -> ObjectStoreArchive {
        let endpoint = format!("http://{}", self.address);
        let options = [
            ("endpoint", endpoint.as_str()),
            ("access_key_id", "backup"),
            ("secret_access_key", secret),
            ("region", "us-east-1"),
        ];
        ObjectStoreArchive::new(&format!("s3://backups/{prefix}"), options).unwrap()
    }

    fn refuse(&self, requests: usize, status: usize) {
        self.faults.status.store(status, SeqCst);
        self.faults.refuse.store(requests, SeqCst);
    }
}

async fn serve(root: &Path, faults: Arc<Faults>) -> SocketAddr {
    let mut builder = S3ServiceBuilder::new(s3s_fs::FileSystem::new(root).unwrap());
    builder.set_auth(SimpleAuth::from_single("backup", "secret"));
    let service = builder.build();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (service, faults) = (service.clone(), Arc::clone(&faults));
            tokio::spawn(async move {
                let answer = service_fn(move |request: Request<Incoming>| {
                    let (service, faults) = (service.clone(), Arc::clone(&faults));
                    async move { Ok::<_, Infallible>(answer(service, &faults, request).await) }
                });
                let _ = Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), answer).await;
            });
        }
    });
    address
}

async fn answer(service: s3s::service::S3Service, faults: &Faults, request: Request<Incoming>) -> Response<Body> {
    if faults.refuse.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)).is_ok() {
        let mut response = Response::new(Body::empty());
        *response.status_mut() = StatusCode::from_u16(faults.status.load(SeqCst) as u16).unwrap();
        return response;
    }
    if faults.overlook.load(SeqCst) && request.method() == Method::PUT {
        // The header is signed and cannot be taken away, but what it asks for can.
        let _ = std::fs::remove_file(faults.root.join(request.uri().path().trim_start_matches('/')));
    }
    let _one = if request.method() == Method::PUT { Some(faults.puts.lock().await) } else { None };
    match service.call(request.map(Body::from)).await {
        Ok(response) => response,
        Err(error) => panic!("the server of the test fails: {error:?}"),
    }
}

fn name(name: &str) -> ObjectName {
    ObjectName::new(name).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_keeps_every_promise_of_an_archive() {
    let s3 = S3::start().await;
    conformance::check(Arc::new(s3.archive("deep/prefix"))).await.unwrap();
    // A neighbour whose prefix begins alike is another archive.
    s3.archive("deep/prefix-2").put(&name("stranger"), Bytes::from_static(b"x"), PutMode::CreateOnly).await.unwrap();
    let found = Repository::open(s3.archive("deep/pre"), Key::unencrypted()).await.unwrap_err();
    assert_eq!(found.kind(), ErrorKind::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_throttles_or_is_out_of_order_for_a_moment_is_asked_again() {
    let s3 = S3::start().await;
    let archive = s3.archive("patient");
    archive.put(&name("a"), Bytes::from_static(b"1"), PutMode::CreateOnly).await.unwrap();
    for status in [429, 503, 500] {
        s3.refuse(2, status);
        assert_eq!(archive.get(&name("a"), None).await.unwrap(), Bytes::from_static(b"1"), "after {status}");
        s3.refuse(2, status);
        let fresh = name(&format!("after-{status}"));
        assert_eq!(archive.put(&fresh, Bytes::new(), PutMode::CreateOnly).await.unwrap(), PutOutcome::Stored);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_overlooks_conditions_is_refused_unless_that_is_accepted() {
    let s3 = S3::start().await;
    s3.faults.overlook.store(true, SeqCst);
    let archive = s3.archive("careless");
    let refused = archive.put(&name("a"), Bytes::new(), PutMode::CreateOnly).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unsupported, "{}", refused.report());
    let accepted = s3.archive("careless").unconditional();
    for outcome in [PutOutcome::Stored, PutOutcome::AlreadyExists] {
        assert_eq!(accepted.put(&name("a"), Bytes::new(), PutMode::CreateOnly).await.unwrap(), outcome);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_credentials_buckets_and_options_are_told_from_an_outage() {
    let s3 = S3::start().await;
    let denied = s3.archive_as("x", "wrong").get(&name("a"), None).await.unwrap_err();
    assert_eq!(denied.kind(), ErrorKind::Unauthorized, "{}", denied.report());
    assert!(!denied.report().contains("wrong"), "{}", denied.report());
    for bad in ["ftp://x/y", "not a url", "file:///tmp"] {
        assert_eq!(ObjectStoreArchive::from_env(bad).unwrap_err().kind(), ErrorKind::InvalidInput, "{bad}");
    }
    let unknown = ObjectStoreArchive::new("s3://b/p", [("no_such_option", "1")]).unwrap_err();
    assert!(unknown.report().contains("no_such_option"), "{}", unknown.report());
    for url in ["gs://bucket/prefix", "az://container/prefix"] {
        let options: &[(&str, &str)] =
            if url.starts_with("az") { &[("account_name", "a"), ("account_key", "a2V5")] } else { &[] };
        assert!(ObjectStoreArchive::new(url, options.iter().copied()).is_ok(), "{url}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn backups_restores_and_prunes_work_on_a_bucket_and_by_the_example() {
    let s3 = S3::start().await;
    let (host, deployment) = own().await;
    fill(&deployment, "shop", "orders", 5000).await;
    let before = db_hash(&deployment, "shop").await;
    let repository = Repository::open_or_init(s3.archive("shop"), Key::host([1; 32])).await.unwrap();
    for round in 0..2 {
        Backup::builder(&deployment, &repository).namespaces("shop.*").build().unwrap().run().await.unwrap();
        fill(&deployment, "shop", &format!("more{round}"), 500).await;
    }
    deployment.database("shop").drop().await.unwrap();
    let first = repository.snapshots().await.unwrap().snapshots[0].id.clone();
    Restore::builder(&repository, first).into(&deployment).build().unwrap().run().await.unwrap();
    assert_eq!(db_hash(&deployment, "shop").await, before);
    let policy = RetentionPolicy { keep_last: 1, ..RetentionPolicy::default() };
    assert_eq!(Prune::new(&repository, policy).run().await.unwrap().removed.len(), 1);
    let again = Repository::open(s3.archive("shop"), Key::host([1; 32])).await.unwrap();
    assert!(Verify::new(&again).snapshot(SnapshotChoice::Latest).run().await.unwrap().is_sound());

    let endpoint = format!("http://{}", s3.address);
    let uri = host.uri();
    for arguments in [&["create", "--uri", uri.as_str(), "--ns", "shop.*"][..], &["verify"], &["list"]] {
        let mut command = tokio::process::Command::new(example("backup"));
        command.args(arguments).args(["--archive", "s3://backups/example"]);
        command.env("AWS_ENDPOINT_URL", &endpoint).env("AWS_REGION", "us-east-1").env("AWS_ALLOW_HTTP", "true");
        command.env("AWS_ACCESS_KEY_ID", "backup").env("AWS_SECRET_ACCESS_KEY", "secret");
        let output = command.output().await.unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

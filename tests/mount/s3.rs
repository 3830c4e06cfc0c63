//! Stores in S3, served by `SeaweedFS`: what the protocol adds to reading from a web server. A download, so
//! only with --servers.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use support::*;

const KEY: &str = "testkey";
const SECRET: &str = "a-secret-that-nobody-may-see";
const BUCKET: &str = "images";

/// A server of its own, ended with its test.
struct SeaweedFs {
    child: Child,
    endpoint: String,
}

impl SeaweedFs {
    fn new(store: &Store) -> Self {
        let weed = project().join("target/tools/seaweedfs/bin/weed");
        assert!(weed.is_file(), "{} is missing; run tests/run.sh --servers", weed.display());
        let directory = store.beside("weed");
        fs::create_dir_all(&directory).expect("a directory");
        let keys = format!(
            r#"{{"identities":[{{"name":"t","credentials":[{{"accessKey":"{KEY}","secretKey":"{SECRET}"}}],
                "actions":["Admin","Read","Write","List","Tagging"]}}]}}"#
        );
        let config = store.beside("s3.json");
        fs::write(&config, keys).expect("a file");
        // Each port has a second one, 10,000 above it.
        let [master, volume, filer, s3] = [(); 4].map(|()| {
            loop {
                let port = TcpListener::bind("127.0.0.1:0")
                    .and_then(|found| found.local_addr())
                    .expect("a port")
                    .port();
                let port = 10_000 + port % 20_000;
                let is_free = |port: u16| TcpListener::bind(("127.0.0.1", port)).is_ok();
                if is_free(port) && is_free(port + 10_000) {
                    break port;
                }
            }
        });
        let log = fs::File::create(store.beside("weed.log")).expect("a file");
        let child = Command::new(weed)
            .arg("server")
            .arg(format!("-dir={}", directory.display()))
            .args(["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3", "-volume.max=10"])
            .args([format!("-master.port={master}"), format!("-volume.port={volume}")])
            .args([format!("-filer.port={filer}"), format!("-s3.port={s3}")])
            .arg(format!("-filer.localSocket={}", store.beside("f.sock").display()))
            .arg(format!("-s3.config={}", config.display()))
            .args(["-master.volumeSizeLimitMB=1024", "-master.telemetry=false"])
            .args(["-s3.port.iceberg=0", "-s3.port.lance=0"])
            .current_dir(store.beside("weed"))
            .stdout(log.try_clone().expect("two of a descriptor"))
            .stderr(log)
            .stdin(Stdio::null())
            .spawn()
            .expect("SeaweedFS starts");
        let server = Self { child, endpoint: format!("http://127.0.0.1:{s3}") };
        eventually("SeaweedFS answers", || {
            let mut curl = Command::new("curl");
            let code = curl.args(["-s", "-o", "/dev/null", "-w", "%{http_code}", &server.endpoint]).output();
            code.is_ok_and(|code| code.stdout == b"403")
        });
        eventually("a bucket can be made", || server.request("PUT", BUCKET, None));
        server
    }

    /// A request with the right keys; whether it succeeded.
    fn request(&self, method: &str, path: &str, body: Option<&Path>) -> bool {
        let mut curl = Command::new("curl");
        curl.args(["-s", "-f", "-o", "/dev/null", "--aws-sigv4", "aws:amz:us-east-1:s3"]);
        curl.args(["--user", &format!("{KEY}:{SECRET}"), "-X", method]);
        if let Some(body) = body {
            curl.arg("-T").arg(body);
        }
        curl.arg(format!("{}/{path}", self.endpoint)).status().expect("curl").success()
    }

    fn upload(&self, store: &Store, prefix: &str, name: &str) {
        let path = format!("{BUCKET}/{prefix}/{name}");
        assert!(self.request("PUT", &path, Some(&store.path(name))), "{path} could not be uploaded");
    }

    /// A command with an environment that has what the server needs, but for keys.
    fn chainfs(&self, store: &Store) -> Command {
        let mut command = Command::new("timeout");
        command.args(["--kill-after=2", &hang().as_secs().to_string(), chainfs_binary()]);
        command.env("AWS_ENDPOINT_URL", &self.endpoint).env("AWS_REGION", "us-east-1");
        command.env("HOME", store.beside("home")).env("AWS_EC2_METADATA_DISABLED", "true");
        command
    }
}

impl Drop for SeaweedFs {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn images() -> Store {
    let store = Store::new();
    store.create("base.qcow2", 24 * MIB, "");
    store.scribble("base.qcow2", "qcow2", 1);
    store.io("base.qcow2", "qcow2", ["write -q -P 9 2M 20M"]);
    store.overlay("web.qcow2", "base.qcow2", "qcow2", "");
    store.scribble("web.qcow2", "qcow2", 2);
    store
}

#[test]
#[ignore = "downloads SeaweedFS; see --servers"]
fn a_store_in_s3_is_mounted_and_no_secret_is_shown() {
    let store = images();
    let server = SeaweedFs::new(&store);
    for name in ["base.qcow2", "web.qcow2"] {
        server.upload(&store, "golden/x", name);
    }
    let address = format!("s3://{BUCKET}/golden");
    // Keys from the environment for a command, from the user's files for the mount.
    let tree = |key: &str, secret: &str, address: &str| {
        let mut command = server.chainfs(&store);
        command.env("AWS_ACCESS_KEY_ID", key).env("AWS_SECRET_ACCESS_KEY", secret);
        command.args(["tree", address, "-o", "timeout=5"]);
        command
    };
    assert!(tree(KEY, SECRET, &address).succeeds().contains("x/web"));
    let single = format!("{address}/x/web.qcow2");
    assert!(tree(KEY, SECRET, &single).succeeds().contains("base"));
    assert!(tree(KEY, "wrong", &address).fails().contains("may not be accessed"), "a wrong key");
    assert!(
        tree(KEY, SECRET, "s3://nothing").fails().contains("does not exist"),
        "a bucket that is not there"
    );
    assert!(tree(KEY, SECRET, &format!("{address}/y")).fails().contains("has no objects"), "a wrong prefix");
    let home = store.beside("home");
    fs::create_dir_all(home.join(".aws")).expect("a directory");
    let keys = format!("[default]\naws_access_key_id = {KEY}\naws_secret_access_key = {SECRET}\n");
    fs::write(home.join(".aws/credentials"), keys).expect("a file");
    let options = format!("cache_dir={},rescan=1", store.beside("cache").display());
    let mount =
        Mount::by(&store, server.chainfs(&store), Path::new(&address), &store.beside("mnt"), &options)
            .unwrap_or_else(|refusal| panic!("mount failed: {refusal:?}"));
    assert_same(&mount.path("x/web/active.raw"), &store.oracle("web.qcow2", "qcow2"));
    assert_same(&mount.path("x/web/snapshots/base.raw"), &store.oracle("base.qcow2", "qcow2"));
    // What comes is shown; what is replaced is another one.
    store.raw("more.raw", MIB, 5);
    server.upload(&store, "golden", "more.raw");
    eventually("a new object is shown", || mount.path("more/active.raw").exists());
    assert_same(&mount.path("more/active.raw"), &store.path("more.raw"));
    store.raw("more.raw", MIB, 6);
    server.upload(&store, "golden", "more.raw");
    eventually("a replaced object is shown", || {
        fs::read(mount.path("more/active.raw"))
            .is_ok_and(|found| found == fs::read(store.path("more.raw")).expect("it"))
    });
    let mut said = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
    said += &fs::read_to_string(store.beside("mount.output")).expect("its output");
    for file in ["README.txt", ".chainfs/metrics", ".chainfs/problems.txt", ".chainfs/index.html"] {
        said += &fs::read_to_string(mount.path(file)).expect("a file of the mount");
    }
    for entry in fs::read_dir(store.beside("cache")).expect("a cache") {
        said += &String::from_utf8_lossy(&fs::read(entry.expect("an entry").path()).expect("a file"));
    }
    assert!(said.contains("chainfs_remote_requests_total") && said.contains(&address));
    assert!(!said.contains(SECRET) && !said.contains(KEY));
}

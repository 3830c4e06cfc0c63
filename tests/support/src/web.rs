//! A web server of a directory, with ranges and entity tags, that can be told to misbehave: what a remote
//! store is read from in tests without a large server.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs;
use std::io::{BufReader, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

/// What the server does instead of answering properly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It sends half of the body and closes the connection.
    Cut,
    /// It announces and sends too few bytes for the range.
    Short,
    /// It sends another range of the same length, and says so.
    OtherRange,
    /// It ignores the range.
    Whole,
    /// Other bytes of the right length.
    OtherBytes,
    /// The status code.
    Status(u16),
    /// It accepts the request and is silent.
    Stall,
    /// It says that the object is another version.
    OtherTag,
    /// It sends the client elsewhere, where the object is.
    Redirect,
    /// It closes the connection at once.
    Hangup,
}

#[derive(Default)]
struct State {
    root: PathBuf,
    /// The fault of the next requests for bytes, and of how many.
    faults: Mutex<Vec<(Fault, u64)>>,
    /// Time before each answer.
    latency: Mutex<Duration>,
    /// Requests for bytes.
    reads: AtomicU64,
    requests: AtomicU64,
    sent: AtomicU64,
    /// Ranges that were read, by path.
    ranges: Mutex<HashMap<String, Vec<(u64, u64)>>>,
    is_over: AtomicBool,
    is_down: AtomicBool,
}

/// A server, until it is dropped.
pub struct WebServer {
    port: u16,
    state: Arc<State>,
}

impl WebServer {
    /// Serves the files beneath `root`.
    pub fn new(root: &Path) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let state = Arc::new(State { root: root.to_path_buf(), ..State::default() });
        let of_thread = Arc::clone(&state);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if of_thread.is_over.load(Ordering::Relaxed) {
                    break;
                }
                let (Ok(stream), state) = (stream, Arc::clone(&of_thread)) else { continue };
                std::thread::spawn(move || serve(&stream, &state));
            }
        });
        Self { port, state }
    }

    /// The address of the directory.
    pub fn address(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// The next `count` requests for bytes meet a fault.
    pub fn fail(&self, fault: Fault, count: u64) {
        self.state.faults.lock().push((fault, count));
    }

    /// No request meets a fault any more.
    pub fn behave(&self) {
        self.state.faults.lock().clear();
    }

    /// Time before each answer.
    pub fn delay(&self, latency: Duration) {
        *self.state.latency.lock() = latency;
    }

    /// Whether connections are closed at once, as if the network was gone.
    pub fn set_down(&self, is_down: bool) {
        self.state.is_down.store(is_down, Ordering::Relaxed);
    }

    /// Requests for bytes so far.
    pub fn reads(&self) -> u64 {
        self.state.reads.load(Ordering::Relaxed)
    }

    /// All requests so far.
    pub fn requests(&self) -> u64 {
        self.state.requests.load(Ordering::Relaxed)
    }

    /// Bytes of objects that were sent so far.
    pub fn sent(&self) -> u64 {
        self.state.sent.load(Ordering::Relaxed)
    }

    /// The ranges that were read of a file.
    pub fn ranges(&self, path: &str) -> Vec<(u64, u64)> {
        self.state.ranges.lock().get(path).cloned().unwrap_or_default()
    }
}

impl Drop for WebServer {
    fn drop(&mut self) {
        self.state.is_over.store(true, Ordering::Relaxed);
        // Wakes the thread that accepts.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

/// Serves requests of one connection until it is closed.
fn serve(stream: &TcpStream, state: &State) {
    let _ = stream.set_nodelay(true);
    let mut reader = BufReader::new(stream);
    while let Some((method, target, headers)) = request(&mut reader) {
        if state.is_over.load(Ordering::Relaxed) || state.is_down.load(Ordering::Relaxed) {
            break;
        }
        state.requests.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(*state.latency.lock());
        if answer(stream, state, &method, &target, &headers).is_none() {
            break;
        }
    }
    let _ = stream.shutdown(Shutdown::Both);
}

fn request(reader: &mut impl std::io::BufRead) -> Option<(String, String, HashMap<String, String>)> {
    let mut line = String::new();
    reader.read_line(&mut line).ok().filter(|len| *len > 0)?;
    let mut words = line.split_whitespace();
    let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok().filter(|len| *len > 0)?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    Some((method, target, headers))
}

/// Answers a request; `None` if the connection ends.
fn answer(
    mut out: &TcpStream,
    state: &State,
    method: &str,
    target: &str,
    headers: &HashMap<String, String>,
) -> Option<()> {
    // What a redirect leads to is the same.
    let target = target.strip_prefix("/elsewhere").unwrap_or(target);
    let name = decoded(target.trim_matches('/'));
    let path = state.root.join(&name);
    let mut reply = |status: &str, more: &str, body: &[u8]| {
        let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n{more}\r\n", body.len());
        out.write_all(head.as_bytes()).ok()?;
        if method == "HEAD" { Some(()) } else { out.write_all(body).ok() }
    };
    // Like some servers, it finds a file whose address has a slash too many.
    if target.ends_with('/') && !path.is_file() {
        let Ok(entries) = fs::read_dir(&path) else { return reply("404 Not Found", "", b"") };
        let mut page = "<a href=\"../\">..</a>\n".to_owned();
        for entry in entries.flatten() {
            let slash = if entry.path().is_dir() { "/" } else { "" };
            let name = encoded(&entry.file_name().to_string_lossy());
            let _ = writeln!(page, "<a href=\"{name}{slash}\">x</a>");
        }
        return reply("200 OK", "Content-Type: text/html\r\n", page.as_bytes());
    }
    let Some(bytes) = fs::read(&path).ok() else { return reply("404 Not Found", "", b"") };
    let modified = fs::metadata(&path).and_then(|found| found.modified()).ok()?;
    let age = modified.duration_since(std::time::UNIX_EPOCH).ok()?;
    let mut tag = format!("\"{:x}-{:x}\"", age.as_nanos(), bytes.len());
    let fixed = "Accept-Ranges: bytes\r\nLast-Modified: Tue, 01 Dec 2026 00:00:00 GMT\r\n";
    if method == "HEAD" {
        let head =
            format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nETag: {tag}\r\n{fixed}\r\n", bytes.len());
        return out.write_all(head.as_bytes()).ok();
    }
    let range = headers.get("range").and_then(|range| {
        let (start, end) = range.strip_prefix("bytes=")?.split_once('-')?;
        Some((start.parse::<usize>().ok()?, end.parse::<usize>().ok()? + 1))
    });
    let (mut start, mut end) = range.unwrap_or((0, bytes.len()));
    end = end.min(bytes.len());
    state.reads.fetch_add(1, Ordering::Relaxed);
    state.ranges.lock().entry(name).or_default().push((start as u64, end as u64));
    let fault = {
        let mut faults = state.faults.lock();
        let fault = faults.first().map(|(fault, _)| *fault);
        if let Some((_, count)) = faults.first_mut() {
            *count -= 1;
            if *count == 0 {
                faults.remove(0);
            }
        }
        fault
    };
    match fault {
        Some(Fault::Hangup) => return None,
        Some(Fault::Stall) => {
            std::thread::sleep(Duration::from_secs(20));
            return None;
        }
        Some(Fault::Status(code)) => {
            return reply(&format!("{code} Fault"), "", b"<Error><Code>SlowDown</Code></Error>");
        }
        Some(Fault::Redirect) => {
            return reply("307 Temporary Redirect", &format!("Location: /elsewhere{target}\r\n"), b"");
        }
        Some(Fault::OtherTag) => tag = String::from("\"other\""),
        Some(Fault::OtherRange) if end < bytes.len() => (start, end) = (start + 1, end + 1),
        Some(Fault::OtherRange) if start > 0 => (start, end) = (start - 1, end - 1),
        Some(Fault::Short) => end -= 1,
        _ => {}
    }
    if fault != Some(Fault::OtherTag) && headers.get("if-match").is_some_and(|wanted| *wanted != tag) {
        return reply("412 Precondition Failed", "", b"");
    }
    let (status, more) = if range.is_some() && fault != Some(Fault::Whole) {
        let range = format!("Content-Range: bytes {start}-{}/{}\r\n", end - 1, bytes.len());
        ("206 Partial Content", range)
    } else {
        (start, end) = (0, bytes.len());
        ("200 OK", String::new())
    };
    let mut body = bytes[start..end].to_vec();
    if fault == Some(Fault::OtherBytes) {
        for byte in &mut body {
            *byte ^= 0x5a;
        }
    }
    let head =
        format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nETag: {tag}\r\n{fixed}{more}\r\n", body.len());
    out.write_all(head.as_bytes()).ok()?;
    if fault == Some(Fault::Cut) {
        body.truncate(body.len() / 2);
    }
    state.sent.fetch_add(body.len() as u64, Ordering::Relaxed);
    out.write_all(&body).ok()?;
    (fault != Some(Fault::Cut)).then_some(())
}

fn encoded(name: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    name.bytes()
        .map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}

fn decoded(text: &str) -> String {
    let (mut bytes, mut rest) = (Vec::new(), text.bytes());
    while let Some(byte) = rest.next() {
        let hex: Option<String> =
            (byte == b'%').then(|| rest.by_ref().take(2).map(char::from).collect::<String>());
        bytes.push(hex.map_or(byte, |hex| u8::from_str_radix(&hex, 16).expect("two digits")));
    }
    String::from_utf8(bytes).expect("a name in UTF-8")
}

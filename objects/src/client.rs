//! A bucket that is open: its client, the runtime of its requests, its names.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, S3ConditionalPut};
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::http::HttpBuilder;
use object_store::path::Path;
use object_store::{BackoffConfig, ClientOptions, ObjectStore, RetryConfig};
use parking_lot::Mutex;
use tokio::runtime::Runtime;

use crate::credentials;
use crate::error::{ObjectError, ObjectErrorKind};
use crate::index_page::IndexPages;
use crate::latency::Latencies;
use crate::location::{Location, Service};
use crate::requests::{Counters, Patience};

/// Threads that wait for replies. Callers compute with theirs.
const THREADS: usize = 2;

/// A bucket that is open. Calls may come from any number of threads, but not from those of a runtime.
pub struct Bucket {
    location: Location,
    prefix: Path,
    store: Arc<dyn ObjectStore>,
    /// Of a web server.
    pages: Option<IndexPages>,
    runtime: Runtime,
    patience: Patience,
    /// Of small reads and of large ones.
    latencies: [Mutex<Latencies>; 2],
    counters: Counters,
    /// What an error says as well: that no credentials were found.
    hint: Option<&'static str>,
    /// Whether the last call ended without an answer.
    is_down: AtomicBool,
}

impl Bucket {
    /// Opens a bucket with the credentials of the environment and of the usual files. Sends nothing.
    pub fn open(location: &Location, patience: Patience) -> Result<Self, ObjectError> {
        install_crypto();
        let (store, hint) = store_of(location, patience).map_err(|error| match error {
            Opening::Client(error) => ObjectError::of(&location.to_string(), &error),
            Opening::Credentials(error) => error,
        })?;
        let pages = (location.service() == Service::Http)
            .then(|| IndexPages::new(location.url(), patience))
            .transpose()?;
        Ok(Self { hint, ..Self::over(location, store, pages, patience)? })
    }

    /// A bucket of any other store, for tests.
    pub fn of_store(location: &Location, store: Arc<dyn ObjectStore>, patience: Patience) -> Self {
        Self::over(location, store, None, patience).expect("a runtime")
    }

    fn over(
        location: &Location,
        store: Arc<dyn ObjectStore>,
        pages: Option<IndexPages>,
        patience: Patience,
    ) -> Result<Self, ObjectError> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(THREADS)
            .thread_name("objects")
            .enable_all()
            .build()
            .map_err(|error| {
                ObjectError::new(ObjectErrorKind::Failed, format!("{location}: no threads for it: {error}"))
            })?;
        Ok(Self {
            prefix: location.prefix()?,
            location: location.clone(),
            store,
            pages,
            runtime,
            patience,
            latencies: <[Mutex<Latencies>; 2]>::default(),
            counters: Counters::default(),
            hint: None,
            is_down: AtomicBool::new(false),
        })
    }

    /// Where it is.
    pub fn location(&self) -> &Location {
        &self.location
    }

    /// How long its calls may take.
    pub fn patience(&self) -> Patience {
        self.patience
    }

    /// What has happened since it was opened.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    pub(crate) fn hint(&self) -> Option<&str> {
        self.hint
    }

    pub(crate) fn is_down(&self) -> bool {
        self.is_down.load(Ordering::Relaxed)
    }

    pub(crate) fn set_down(&self, is_down: bool) {
        self.is_down.store(is_down, Ordering::Relaxed);
    }

    pub(crate) fn store(&self) -> &dyn ObjectStore {
        &*self.store
    }

    pub(crate) fn prefix(&self) -> &Path {
        &self.prefix
    }

    pub(crate) fn index_pages(&self) -> Option<&IndexPages> {
        self.pages.as_ref()
    }

    pub(crate) fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    pub(crate) fn latencies(&self, is_large: bool) -> &Mutex<Latencies> {
        &self.latencies[usize::from(is_large)]
    }

    /// The path of the object `name`, and how messages call it.
    pub(crate) fn path_of(&self, name: &str) -> Result<(Path, String), ObjectError> {
        let shown = format!("{}/{name}", self.location);
        let whole =
            if self.prefix.as_ref().is_empty() { name.to_owned() } else { format!("{}/{name}", self.prefix) };
        match Path::parse(whole) {
            Ok(path) => Ok((path, shown)),
            Err(error) => Err(ObjectError::new(ObjectErrorKind::NotFound, format!("{shown}: {error}"))),
        }
    }

    /// The name of what a listing has, `None` if it lies elsewhere or is the prefix itself.
    pub(crate) fn name_of(&self, path: &Path) -> Option<String> {
        let name = match self.prefix.as_ref() {
            "" => path.as_ref(),
            prefix => path.as_ref().strip_prefix(prefix)?.strip_prefix('/')?,
        };
        (!name.is_empty()).then(|| name.to_owned())
    }
}

impl fmt::Debug for Bucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Bucket").field(&self.location.to_string()).finish()
    }
}

enum Opening {
    Client(object_store::Error),
    Credentials(ObjectError),
}

impl From<object_store::Error> for Opening {
    fn from(error: object_store::Error) -> Self {
        Self::Client(error)
    }
}

impl From<ObjectError> for Opening {
    fn from(error: ObjectError) -> Self {
        Self::Credentials(error)
    }
}

/// A client of its own service, and what is to be said if it fails.
type Client = (Arc<dyn ObjectStore>, Option<&'static str>);

fn store_of(location: &Location, patience: Patience) -> Result<Client, Opening> {
    let url = location.url().as_str();
    let (options, retry) = (options(location, patience), no_retries());
    let mut hint = None;
    let store: Arc<dyn ObjectStore> = match location.service() {
        Service::S3 => {
            let builder = credentials::complete(AmazonS3Builder::from_env())?;
            if !credentials::are_found(&builder) {
                hint = Some(
                    "no credentials were found in the environment, in ~/.aws or on this machine; for a \
                     public bucket set AWS_SKIP_SIGNATURE=true",
                );
            }
            let builder = builder
                .with_url(url)
                .with_conditional_put(S3ConditionalPut::ETagMatch)
                .with_client_options(options)
                .with_retry(retry);
            Arc::new(builder.build()?)
        }
        Service::Google => {
            let builder = GoogleCloudStorageBuilder::from_env().with_url(url);
            Arc::new(builder.with_client_options(options).with_retry(retry).build()?)
        }
        Service::Azure => {
            let builder = MicrosoftAzureBuilder::from_env().with_url(url);
            Arc::new(builder.with_client_options(options).with_retry(retry).build()?)
        }
        Service::Http => {
            let server = &location.url()[..url::Position::BeforePath];
            let builder = HttpBuilder::new().with_url(server).with_client_options(options);
            Arc::new(builder.with_retry(retry).build()?)
        }
    };
    Ok((store, hint))
}

/// Plain HTTP only where the user asked for it: by the address, or by an endpoint of the environment.
fn options(location: &Location, patience: Patience) -> ClientOptions {
    let endpoint = ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"]
        .iter()
        .any(|key| std::env::var(key).is_ok_and(|url| url.starts_with("http://")));
    ClientOptions::new()
        .with_allow_http(endpoint || location.url().scheme() == "http")
        .with_connect_timeout(patience.attempt().min(Duration::from_secs(5)))
        .with_timeout(patience.attempt())
        .with_pool_max_idle_per_host(32)
}

/// Attempts are this crate's, within the deadline of the call.
fn no_retries() -> RetryConfig {
    RetryConfig { backoff: BackoffConfig::default(), max_retries: 0, retry_timeout: Duration::from_secs(1) }
}

/// Chooses ring for all TLS of the process, once.
fn install_crypto() {
    static ONCE: OnceLock<()> = OnceLock::new();
    ONCE.get_or_init(|| {
        // An error says that one is chosen already.
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
}

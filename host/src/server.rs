//! Builds the parts in order, and takes them down in reverse within a grace period.

use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use prometheus_client::registry::Registry;
use stockade_cache::{
    Backing, CacheEngine, CacheError, EngineConfig, Prefault, TokenHasher, remove_dead_segments,
};
use stockade_sandbox::{
    Compiler, Contract, FIRST_BACKOFF, ModuleForm, NativeConfig, Network, Policy, Services,
    Supervisor, SupervisorConfig, WasmConfig, wasm::GUEST_STACK,
};
use stockade_transport::{Endpoint, ListenOptions, Listener};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::watch,
};

use crate::{
    admin::{self, Admin, AdminParts, Socket, Tls, Tokens},
    budgets::TenantBudgets,
    config::Config,
    coordinator::{Coordinator, CoordinatorEvents, Member},
    plugin_host::{PluginRanker, PluginServer},
    service::{Service, ServiceHandler, ServiceSettings, TransferMode},
    state_dir::StateDir,
    telemetry::Log,
    tenancy::{MeterFile, Tenancy, TenantFile},
    tier::{Tier, TierConfig},
    traces::Traces,
    watchdog::{BEAT, Heart, Watchdog},
};

/// How often the service looks after leases, sessions and the watermark.
const MAINTENANCE_INTERVAL: Duration = Duration::from_millis(250);
/// Least time between two looks at the watermark after stores.
const EVICTION_SPACING: Duration = Duration::from_millis(5);
/// How often the bytes of tenants are summed up.
const SAMPLE_INTERVAL: Duration = Duration::from_secs(1);
/// Memory that a growing pool takes ahead of its use: seconds of stores, at the speed with
/// which the kernel gives pages.
const GROWTH_AHEAD_BYTES: u64 = 1 << 30;
/// Default names of segments are this and the port.
const SEGMENT_PREFIX: &str = "stockade-";
/// Folder of the state directory with what plugins keep.
const PLUGIN_STATE: &str = "plugin-state";
/// What plugins get to end by themselves when the server stops; their own grace may be shorter.
const PLUGIN_GRACE: Duration = Duration::from_secs(5);
/// What the receiver of traces gets to take the last ones.
const TRACES_GRACE: Duration = Duration::from_secs(2);

/// What the second tier gets to write down what waits when the server stops.
const WRITE_DOWN_GRACE: Duration = Duration::from_secs(5);

/// A server with everything found, checked, mapped and bound, that does not answer yet.
pub struct Server {
    config: Config,
    listeners: Vec<Listener>,
    http: TcpListener,
    metrics: Option<TcpListener>,
    http_socket: Option<Socket>,
    tokens: Option<Arc<Tokens>>,
    tls: Option<Arc<Tls>>,
    log: Log,
    engine: Arc<CacheEngine>,
    tier: Option<Arc<Tier>>,
    budgets: TenantBudgets,
    supervisor: Supervisor,
    plugin_state: Option<PathBuf>,
    port: u16,
    http_addr: SocketAddr,
}

impl Server {
    /// Does all that can fail, plugins and memory before any port.
    ///
    /// # Errors
    /// One sentence that says what could not be had and what to do.
    pub async fn prepare(config: Config, log: Log) -> anyhow::Result<Self> {
        let tokens = match &config.http_token_file {
            Some(path) => Some(Arc::new(
                Tokens::read(path).context("--http-token-file cannot be used")?,
            )),
            None => None,
        };
        let tls = match &config.http_tls {
            Some(files) => Some(Arc::new(Tls::read(files.clone())?)),
            None => None,
        };
        let state = match &config.state_dir {
            Some(path) => Some(StateDir::open(path).context("--state-dir cannot be used")?),
            None => None,
        };
        let plugin_state = state
            .as_ref()
            .map(|state| state.folder(PLUGIN_STATE))
            .transpose()
            .context("--state-dir cannot be used")?;
        let supervisor = Supervisor::discover(supervisor_config(&config)?)?;
        let endpoint = tcp_endpoint(&config.host, config.port)?;
        let (main, further) = config
            .listeners
            .split_first()
            .context("there is no listener to serve")?;
        let main = main.options();

        // The segment's name follows from the port, which for port 0 is known once it is bound.
        let mut bound = None;
        let port = match config.port {
            0 => bind_zmq(&mut bound, &endpoint, &main).await?,
            port => port,
        };
        let engine = Arc::new(open_engine(&config, port, &endpoint).await?);
        let budgets = TenantBudgets::restore(state.as_ref(), config.tenants.clone(), &engine)
            .context("--state-dir cannot be used")?;
        if bound.is_none() {
            bind_zmq(&mut bound, &endpoint, &main).await?;
        }
        let tier = match config.l2.clone() {
            Some(l2) => Some(open_tier(&engine, l2).await?),
            None => None,
        };
        let mut listeners: Vec<_> = bound.into_iter().collect();
        for listener in further {
            let Some(endpoint) = &listener.endpoint else {
                bail!("listener {}: endpoint is missing", listener.name);
            };
            let bound = Listener::bind(endpoint, listener.options())
                .await
                .with_context(|| format!("listener {} cannot be bound", listener.name))?;
            listeners.push(bound);
        }
        let http = bind_http(&config.http_host, config.http_port, "--http-port").await?;
        let metrics = match config.prometheus_port {
            Some(port) => Some(bind_http(&config.http_host, port, "--prometheus-port").await?),
            None => None,
        };
        let http_addr = http
            .local_addr()
            .context("the HTTP address could not be read back")?;
        if !http_addr.ip().is_loopback() && tokens.is_none() && !config.http_insecure {
            bail!(
                "--http-host {} is {http_addr}, which other machines reach, and there are no tokens: give --http-token-file",
                config.http_host
            );
        }
        let http_socket = match &config.http_socket {
            Some(path) => Some(admin::bind_socket(path)?),
            None => None,
        };
        Ok(Self {
            config,
            listeners,
            http,
            metrics,
            http_socket,
            tokens,
            tls,
            log,
            engine,
            tier,
            budgets,
            supervisor,
            plugin_state,
            port,
            http_addr,
        })
    }

    /// The port that the main ZMQ endpoint is bound to.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The address that the HTTP API is bound to.
    #[must_use]
    pub fn http_addr(&self) -> SocketAddr {
        self.http_addr
    }

    /// Answers until `shutdown`, then drains and ends the plugins.
    ///
    /// # Errors
    /// When a part cannot be started.
    pub async fn run(
        self,
        floods: tokio::runtime::Handle,
        shutdown: impl Future<Output = ()> + Send + 'static,
    ) -> anyhow::Result<()> {
        let config = self.config;
        let mut registry = Registry::default();
        let tenancy = Arc::new(Tenancy::new(
            Arc::clone(&config.tenant_rules),
            tokio::runtime::Handle::current().metrics().num_workers(),
        ));
        if let Some(directory) = &config.audit_log_dir {
            tenancy.audit().write_to(directory).with_context(|| {
                format!(
                    "--audit-log-dir {} cannot be written to",
                    directory.display()
                )
            })?;
        }
        warn_of_open_listeners(&config);
        let (coordinator_events, coordinator) = match &config.coordinator {
            Some(settings) => {
                let member = Member {
                    instance_id: config.instance_id.clone(),
                    http_port: self.http_addr.port(),
                    capacity_bytes: self.engine.capacity_bytes(),
                };
                let (events, coordinator) = Coordinator::start(settings.clone(), member)?;
                (events, Some(coordinator))
            }
            None => (CoordinatorEvents::default(), None),
        };
        let (traces, export) = match &config.traces {
            Some(settings) => {
                let (traces, export) = Traces::start(settings, &config.instance_id)?;
                tracing::info!("traces go to {}", settings.endpoint);
                (traces, Some(export))
            }
            None => (Traces::default(), None),
        };
        let service = Service::new(
            Arc::clone(&self.engine),
            TokenHasher::new(config.chunk_size),
            Arc::clone(&tenancy),
            ServiceSettings {
                deadline: config.request_deadline,
                worker_reap_timeout: config.worker_reap_timeout,
                worker_registration_grace: config.worker_registration_grace,
                session_ttl: config.session_ttl,
                write_ttl: config.l1_write_ttl,
                read_ttl: config.l1_read_ttl,
                kv_event_log_size: config.kv_event_log_size,
                traces,
                coordinator: coordinator_events,
                transfer_mode: TransferMode::from_name(&config.supported_transfer_mode)
                    .unwrap_or(TransferMode::Auto),
                null_block_id: config.null_block_id,
                lookup_hash_log: config.lookup_hash_log.clone(),
            },
            self.tier.clone(),
            &mut registry,
        )
        .context("--lookup-hash-log-dir cannot be used")?;
        let transport = stockade_transport::Server::new(
            ServiceHandler(Arc::clone(&service)),
            transport_config(&config),
        )
        .context("the transport's limits are not usable")?
        .yielding_on(floods);

        let shm_name = self.engine.shm_name().unwrap_or_default().to_owned();
        let plugin_json = config.plugin_json(self.port, self.http_addr.port(), &shm_name);
        let contract = Contract {
            config_json: plugin_json.to_string(),
            extra_config_json: serde_json::Value::Object(config.runtime_plugin_config.clone())
                .to_string(),
        };
        let supervisor = Arc::new(self.supervisor);
        let plugin_host = Arc::new(PluginServer::new(&service));
        supervisor.provide(Services {
            host: Some(Arc::clone(&plugin_host) as _),
            state_dir: self.plugin_state,
            witness: None,
        });
        service.serve_modules(&supervisor);
        let ranker = Arc::new(PluginRanker::new(Arc::clone(service.tenancy())));
        ranker.ask(&supervisor);
        self.engine.set_ranker(Arc::clone(&ranker) as _);
        let watchdog = Watchdog::start().context("the watchdog's thread could not be started")?;
        let log = self.log.clone();
        watchdog.watch_work("log writer", move || log.writing_for());
        for listener in &self.listeners {
            let turns = listener.turns();
            watchdog.watch(&format!("accept {}", listener.endpoint()), move || {
                turns.load(Ordering::Relaxed)
            });
        }
        let meter_file = match &config.metering_dir {
            Some(path) => Some(MeterFile::open(path).with_context(|| {
                format!("--metering-dir {} cannot be written to", path.display())
            })?),
            None => None,
        };
        let (stop, stopped) = watch::channel(false);
        let admin = Admin::new(AdminParts {
            service: Arc::clone(&service),
            budgets: self.budgets,
            tenant_file: TenantFile::new(config.clone(), Arc::clone(&service)),
            supervisor: Arc::clone(&supervisor),
            ranker: Arc::clone(&ranker),
            plugin_host,
            transport: transport.stats(),
            registry,
            config: plugin_json,
            watchdog,
            log: self.log,
            tokens: self.tokens.clone(),
            insecure: config.http_insecure,
            stopped: stopped.clone(),
        });

        let router = admin::router(&admin);
        let heart = |name: &str| admin.watchdog.heart(name);
        let mut tasks = vec![tokio::spawn(admin::serve(
            Socket::Tcp(self.http),
            self.tls.clone(),
            router.clone(),
            heart("http"),
            stopped.clone(),
        ))];
        if let Some(socket) = self.http_socket {
            let heart = heart("http socket");
            tasks.push(tokio::spawn(admin::serve(
                socket,
                None,
                router,
                heart,
                stopped.clone(),
            )));
        }
        if let Some(listener) = self.metrics {
            tasks.push(tokio::spawn(admin::serve(
                Socket::Tcp(listener),
                self.tls.clone(),
                admin::metrics_router(&admin),
                heart("metrics"),
                stopped.clone(),
            )));
        }
        tasks.push(tokio::spawn(maintain(
            Arc::clone(&service),
            ranker,
            heart("maintenance"),
            stopped.clone(),
        )));
        tasks.push(tokio::spawn(meter(
            Arc::clone(&service),
            Arc::clone(&supervisor),
            meter_file,
            config.metering_interval,
            heart("meter"),
            stopped.clone(),
        )));
        tasks.push(tokio::spawn(observe(
            Arc::clone(&admin),
            self.tokens,
            self.tls,
            heart("observer"),
            stopped.clone(),
        )));

        let writers = self.tier.as_ref().map(Tier::start).unwrap_or_default();

        let endpoints: Vec<_> = self
            .listeners
            .iter()
            .map(|listener| listener.endpoint().to_string())
            .collect();
        let draining = async move {
            let mut stopped = stopped;
            // The sender lives until the end of this function; its loss ends everything too.
            let _ = stopped.wait_for(|&is_stopped| is_stopped).await;
        };
        let serving = tokio::spawn(async move { transport.serve(self.listeners, draining).await });
        supervisor.start(&contract)?;
        if let Some(ticks) = supervisor.epoch_ticks() {
            admin
                .watchdog
                .watch("plugin epochs", move || ticks.load(Ordering::Relaxed));
        }
        tracing::info!(
            "serving on {} with HTTP on {}://{} (pool {:.2} GiB, {}, eviction {}, chunk size {}, {} plugins)",
            endpoints.join(" and "),
            if config.http_tls.is_some() {
                "https"
            } else {
                "http"
            },
            self.http_addr,
            config.l1_size_bytes as f64 / (1u64 << 30) as f64,
            if shm_name.is_empty() {
                "no shared memory".to_owned()
            } else {
                format!("shared memory {shm_name}")
            },
            config.eviction_policy,
            config.chunk_size,
            supervisor.snapshot().len(),
        );

        shutdown.await;
        tracing::info!("stopping");
        service.drain();
        admin.watchdog.rest();
        // Nobody waits on plugins: they are told first, and end while connections drain.
        let plugins = supervisor.shutdown(PLUGIN_GRACE);
        stop.send_replace(true);
        let (_, served) = tokio::join!(plugins, serving);
        served.context("the transport failed")?;
        if let Some(tier) = &self.tier
            && !tier.drain(WRITE_DOWN_GRACE).await
        {
            tracing::warn!("stopped before everything was written to the second tier");
        }
        for writer in writers {
            writer.abort();
        }
        if let Some(coordinator) = coordinator {
            coordinator.finish().await;
        }
        for task in tasks {
            // A client that keeps an HTTP connection open does not keep the server up.
            if tokio::time::timeout(Duration::from_secs(1), task)
                .await
                .is_err()
            {
                tracing::warn!("a task did not end in time and is dropped");
            }
        }
        if let Some(export) = export {
            service.end_sessions();
            export.finish(TRACES_GRACE).await;
        }
        let ending = tokio::task::spawn_blocking(move || service.end_logs());
        if let Err(error) = ending.await {
            tracing::error!("the logs of lookups and denials did not end well: {error}");
        }
        tracing::info!("stopped");
        Ok(())
    }
}

/// Says through which listeners strangers come in beside the tenants.
fn warn_of_open_listeners(config: &Config) {
    let listeners: Vec<&str> = config.listeners.iter().map(|it| &*it.name).collect();
    let open = config.tenant_rules.open_listeners(&listeners);
    if !open.is_empty() {
        tracing::warn!(
            "listener {} belongs to no tenant: whoever reaches it may use every salt that no bound tenant has",
            open.join(", ")
        );
    }
}

/// Looks after what the HTTP API shows and takes from files.
async fn observe(
    admin: Arc<Admin>,
    tokens: Option<Arc<Tokens>>,
    tls: Option<Arc<Tls>>,
    heart: Heart,
    mut stopped: watch::Receiver<bool>,
) {
    let mut hangup = signal(SignalKind::hangup()).ok();
    let mut next_sample = Instant::now();
    loop {
        heart.beat();
        heart.stall_here().await;
        let is_asked = tokio::select! {
            () = tokio::time::sleep(BEAT) => false,
            Some(()) = async { hangup.as_mut()?.recv().await } => true,
            _ = stopped.wait_for(|&is_stopped| is_stopped) => return,
        };
        let is_due = Instant::now() >= next_sample;
        if !is_due && !is_asked {
            continue;
        }
        next_sample = Instant::now() + admin::HISTORY_INTERVAL;
        let (admin, tokens, tls) = (Arc::clone(&admin), tokens.clone(), tls.clone());
        let look = tokio::task::spawn_blocking(move || {
            admin::sample(&admin);
            if let Some(tokens) = tokens {
                tokens.refresh();
            }
            if let Some(tls) = tls {
                tls.refresh();
            }
            if is_asked
                && admin.tenant_file.exists()
                && let Err(error) = admin.tenant_file.reload(&admin.budgets)
            {
                tracing::error!("tenants stay as they were: {error}");
            }
        });
        if let Err(error) = look.await {
            tracing::error!("a look at the server failed: {error}");
        }
    }
}

/// Sums up what tenants use, and writes it down.
async fn meter(
    service: Arc<Service>,
    supervisor: Arc<Supervisor>,
    mut file: Option<MeterFile>,
    interval: Duration,
    heart: Heart,
    mut stopped: watch::Receiver<bool>,
) {
    let mut written = Instant::now();
    let mut sampled = Instant::now();
    loop {
        heart.beat();
        heart.stall_here().await;
        let is_over = tokio::select! {
            () = tokio::time::sleep(BEAT) => false,
            _ = stopped.wait_for(|&is_stopped| is_stopped) => true,
        };
        if !is_over && sampled.elapsed() < SAMPLE_INTERVAL {
            continue;
        }
        sampled = Instant::now();
        let is_due = is_over || written.elapsed() >= interval;
        let (sampling, plugins) = (Arc::clone(&service), Arc::clone(&supervisor));
        let mut taken = file.take();
        let work = tokio::task::spawn_blocking(move || {
            let tenancy = sampling.tenancy();
            let sums = tenancy.meter();
            sums.sample(&sampling.engine().budgets(), Instant::now());
            let rules = tenancy.rules();
            for plugin in plugins.snapshot() {
                if let Some(owner) = rules.owner_of_plugin(&plugin.name)
                    && let Some(time) = plugin.cpu_time
                {
                    sums.plugin(&owner.name, &plugin.name, time);
                }
            }
            if is_due
                && let Some(file) = &mut taken
                && let Err(error) = file.write(sums)
            {
                tracing::error!(
                    "what tenants use could not be written, and is tried again: {error}"
                );
            }
            taken
        });
        match work.await {
            Ok(returned) => file = returned,
            Err(error) => tracing::error!("a look at what tenants use failed: {error}"),
        }
        if is_due {
            written = Instant::now();
        }
        if is_over {
            return;
        }
    }
}

async fn maintain(
    service: Arc<Service>,
    ranker: Arc<PluginRanker>,
    heart: Heart,
    mut stopped: watch::Receiver<bool>,
) {
    let mut interval = tokio::time::interval(MAINTENANCE_INTERVAL);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        heart.beat();
        heart.stall_here().await;
        let is_tick = tokio::select! {
            _ = interval.tick() => true,
            () = service.stored() => false,
            _ = stopped.changed() => return,
        };
        let (work, ranker) = (Arc::clone(&service), Arc::clone(&ranker));
        let round = tokio::task::spawn_blocking(move || match is_tick {
            true => {
                ranker.refresh();
                work.maintain();
            }
            false => work.engine().maintain(),
        });
        if let Err(error) = round.await {
            tracing::error!("a round of maintenance failed: {error}");
        }
        if !is_tick {
            tokio::time::sleep(EVICTION_SPACING).await;
        }
    }
}

fn supervisor_config(config: &Config) -> anyhow::Result<SupervisorConfig> {
    let environment: Vec<_> = std::env::vars_os().collect();
    let mut native = NativeConfig::new(environment.iter().cloned(), &[]);
    native.policy = config.native_plugins;
    Ok(SupervisorConfig {
        locations: config.runtime_plugin_locations.clone(),
        policy: config.plugin_policy.clone(),
        watch: config.plugin_watch,
        wasm: wasm_config(config.plugin_cache_dir.as_deref(), &config.plugin_policy)?,
        native,
        server_environment: environment,
        python: config.python_wasm.clone(),
        first_backoff: FIRST_BACKOFF,
    })
}

/// How modules are compiled and where what comes of it is kept.
pub(crate) fn wasm_config(
    cache_dir: Option<&std::path::Path>,
    policy: &Policy,
) -> anyhow::Result<WasmConfig> {
    // What /proc/self/exe points to would be followed anew at each start; this is read once.
    let program = std::env::current_exe().context("the path of this program could not be read")?;
    let mut network = Network::default();
    if let Some(path) = &policy.http_ca_file {
        let named = || format!("[plugins] http_ca_file {}", path.display());
        let pem = std::fs::read(path).with_context(named)?;
        let read = network.with_roots(&pem).map_err(anyhow::Error::msg);
        network = read.with_context(named)?;
    }
    Ok(WasmConfig {
        cache_dir: cache_dir.map_or_else(default_cache_dir, std::path::Path::to_owned),
        compiler: Compiler::Child { program },
        compile_limits: policy.compile_limits(),
        form: ModuleForm::default(),
        network: Arc::new(network),
        stack_bytes: GUEST_STACK,
    })
}

fn default_cache_dir() -> PathBuf {
    let base = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute());
    let base =
        base.or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")));
    base.unwrap_or_else(std::env::temp_dir)
        .join("stockade")
        .join("plugins")
}

fn tcp_endpoint(host: &str, port: u16) -> anyhow::Result<Endpoint> {
    let is_bare_v6 = host.contains(':') && !host.starts_with('[');
    let host = if is_bare_v6 {
        format!("[{host}]")
    } else {
        host.to_owned()
    };
    format!("tcp://{host}:{port}")
        .parse()
        .with_context(|| format!("--host {host} is no host"))
}

/// Binds the main endpoint and returns its port.
async fn bind_zmq(
    bound: &mut Option<Listener>,
    endpoint: &Endpoint,
    options: &ListenOptions,
) -> anyhow::Result<u16> {
    let listener = Listener::bind(endpoint, options.clone())
        .await
        .context("--port cannot be bound")?;
    let port = match listener.endpoint() {
        Endpoint::Tcp { port, .. } => *port,
        other => bail!("{other} has no port"),
    };
    *bound = Some(listener);
    Ok(port)
}

async fn bind_http(host: &str, port: u16, flag: &str) -> anyhow::Result<TcpListener> {
    TcpListener::bind((host, port)).await.with_context(|| {
        format!("{flag} {port} of {host} cannot be bound; if another server listens there, stop it or choose another port with {flag}")
    })
}

async fn open_tier(engine: &Arc<CacheEngine>, config: TierConfig) -> anyhow::Result<Arc<Tier>> {
    let engine = Arc::clone(engine);
    tokio::task::spawn_blocking(move || Tier::open(engine, config))
        .await
        .context("the second tier could not be opened")?
        .map_err(anyhow::Error::msg)
}

async fn open_engine(
    config: &Config,
    port: u16,
    endpoint: &Endpoint,
) -> anyhow::Result<CacheEngine> {
    let name = config.shm_name.clone().unwrap_or_else(|| {
        remove_dead_segments(SEGMENT_PREFIX);
        format!("{SEGMENT_PREFIX}{port}")
    });
    let backing = if name.is_empty() {
        Backing::Private
    } else {
        Backing::Shm { name }
    };
    let mut engine = EngineConfig::new(config.l1_size_bytes, backing);
    engine.align_bytes = config.l1_align_bytes;
    engine.policy = config.eviction_policy;
    engine.tenants.clone_from(&config.tenants);
    engine.trigger_watermark = config.eviction_trigger_watermark;
    engine.eviction_ratio = config.eviction_ratio;
    engine.write_ttl = config.l1_write_ttl;
    engine.read_ttl = config.l1_read_ttl;
    engine.checksum = config.l1_checksum;
    if config.l1_use_lazy {
        engine.prefault = Prefault::AheadOfUse {
            initial_bytes: config.l1_init_size_bytes,
            ahead_bytes: GROWTH_AHEAD_BYTES,
        };
    }
    match CacheEngine::open(engine) {
        Ok(engine) => Ok(engine),
        // A second server on the same port meets the segment first; the port is what it should change.
        Err(error @ CacheError::ShmInUse { .. }) if config.shm_name.is_none() => {
            Listener::bind(endpoint, ListenOptions::default())
                .await
                .context("--port cannot be bound")?;
            Err(error.into())
        }
        Err(error) => Err(error.into()),
    }
}

fn transport_config(config: &Config) -> stockade_transport::Config {
    let mut transport = stockade_transport::Config {
        max_connections: config.max_connections,
        ..Default::default()
    };
    transport.limits.max_frame_bytes = config.max_message_bytes;
    transport.limits.max_message_bytes = config.max_message_bytes;
    transport.max_inbound_bytes = transport
        .max_inbound_bytes
        .max(config.max_message_bytes.saturating_mul(2));
    transport
}

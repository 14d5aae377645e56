//! Who is calling: which tenant a connection belongs to, and what it may name.
//!
//! A connection has a [`Standing`], worked out from its listener, its PLAIN user and the
//! credentials of its process when it first asks for something, and again after the rules were
//! reloaded. From it follows the [`Realm`] that its requests, workers and streams live in, and
//! what becomes of the `cache_salt` that they carry: a salt that the caller may not use is
//! replaced by one that nothing is ever stored under, so that a forged salt goes the whole way of
//! a miss and tells nothing.

mod audit;
mod giving_way;
mod large;
mod line_files;
mod meter;
mod reload;
mod rules;
mod shares;

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, Ordering},
};
use std::task::{Context, Poll};

use parking_lot::RwLock;
use stockade_cache::{CacheSalt, EVERYBODY_ELSE};
use stockade_transport::{Credentials, Peer, Turn};

pub use audit::{Audit, AuditLines, Denied, DeniedCount};
pub use giving_way::{GivingWay, breathe, give_way_to_all};
pub use large::{LargeRequests, TooManyInFlight};
pub use meter::{Meter, MeterFile, Reading, Sums};
pub use reload::TenantFile;
pub use rules::{Binding, HintRules, Rules, TenantRules, Unsalted};
pub use shares::{Rate, Share, ShareUse};

use shares::{Seat, Shares};

/// Fewest and most requests at once for which the server copies.
const COPIES: (usize, usize) = (2, 8);

/// The salt of what nobody may have. Nothing is stored under it, whoever asks.
pub const DENIED_SALT: &str = "stockade-denied";

/// Realm of strangers; no tenant can have this name.
const STRANGER: &str = "\0stranger";

/// Keeps the request ids, worker ids and streams of one tenant apart from all others'.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Realm(Arc<str>);

impl Realm {
    /// The realm of connections that no tenant is bound to.
    #[must_use]
    pub fn open() -> Self {
        Self(Arc::from(""))
    }

    /// The realm of a tenant.
    #[must_use]
    pub(crate) fn of_tenant(name: &Arc<str>) -> Self {
        Self(Arc::clone(name))
    }

    /// The tenant as logs and metrics name it; `(none)` and `(stranger)` for connections
    /// without one.
    #[must_use]
    pub fn shown(&self) -> &str {
        match &*self.0 {
            "" => "(none)",
            STRANGER => "(stranger)",
            name => name,
        }
    }

    /// The tenant's name; empty for [`open`](Self::open).
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0
    }
}

/// Why a caller does not get what it names. The names become metric labels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Denial {
    /// The salt is not one of the tenant's, or belongs to one that is bound elsewhere.
    ForeignSalt,
    /// There is no salt, and the tenant refuses such requests.
    Unsalted,
    /// A connection whose password or key is nobody's, or that gave none where one is asked for.
    Unauthenticated,
    /// The connection belongs to no tenant, and its listener has tenants.
    Stranger,
    /// The caller may not touch everybody's objects.
    Scope,
    /// The tenant is over its rate, and the request has waited for as long as any should.
    OverRate,
    /// The tenant has as many large requests in flight as it may.
    InFlight,
    /// A plugin named what is not its tenant's, or a connection another tenant's plugin.
    Plugin,
    /// An HTTP request without a token that is known.
    HttpUnauthenticated,
    /// An HTTP request for more than its token may, or from another site.
    HttpForbidden,
}

impl Denial {
    /// The name in metrics and in the audit log.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::ForeignSalt => "foreign_salt",
            Self::Unsalted => "unsalted",
            Self::Unauthenticated => "unauthenticated",
            Self::Stranger => "stranger",
            Self::Scope => "scope",
            Self::OverRate => "over_rate",
            Self::InFlight => "in_flight",
            Self::Plugin => "plugin",
            Self::HttpUnauthenticated => "http_unauthenticated",
            Self::HttpForbidden => "http_forbidden",
        }
    }
}

/// What a connection is to the tenants.
#[derive(Debug, Clone)]
pub enum Standing {
    /// Bound to no tenant, on a listener that no tenant claims: any salt that is not bound.
    Open,
    /// A tenant's.
    Tenant(Arc<TenantRules>),
    /// On a listener that tenants claim, and none of theirs.
    Stranger,
}

/// A caller as the operations see it.
#[derive(Debug, Clone)]
pub struct Caller {
    realm: Realm,
    standing: Standing,
    rules: Arc<Rules>,
    share: Share,
    denied: CacheSalt,
    /// The connection, in words.
    origin: Arc<str>,
}

impl Caller {
    fn new(standing: Standing, rules: Arc<Rules>, origin: &str) -> Self {
        let realm = match &standing {
            Standing::Open => Realm::open(),
            Standing::Tenant(tenant) => Realm(Arc::clone(&tenant.name)),
            Standing::Stranger => Realm(Arc::from(STRANGER)),
        };
        let share = match &standing {
            Standing::Open => rules.open_share(),
            Standing::Tenant(tenant) => tenant.share,
            Standing::Stranger => Share::default(),
        };
        Self {
            realm,
            standing,
            rules,
            share,
            denied: denied_salt(),
            origin: Arc::from(origin),
        }
    }

    /// The server itself.
    #[must_use]
    pub fn internal() -> Self {
        Self::new(Standing::Open, Arc::default(), "the server")
    }

    /// Its connection, in words.
    #[must_use]
    pub fn origin(&self) -> &Arc<str> {
        &self.origin
    }

    /// Where its requests and workers live.
    #[must_use]
    pub fn realm(&self) -> &Realm {
        &self.realm
    }

    /// What it is to the tenants.
    #[must_use]
    pub fn standing(&self) -> &Standing {
        &self.standing
    }

    /// What it gets of the server's time.
    #[must_use]
    pub fn share(&self) -> Share {
        self.share
    }

    /// The rules of its tenant.
    #[must_use]
    pub fn tenant(&self) -> Option<&Arc<TenantRules>> {
        match &self.standing {
            Standing::Tenant(tenant) => Some(tenant),
            Standing::Open | Standing::Stranger => None,
        }
    }

    /// The salt that a request with the salt `asked` is about.
    ///
    /// # Errors
    /// The reason why it may not be about any; [`denied_salt`](Self::denied_salt) is to be used
    /// in its place.
    pub fn salt(&self, asked: &CacheSalt) -> Result<CacheSalt, Denial> {
        #[cfg(debug_assertions)]
        if self.rules.is_unchecked() {
            return Ok(asked.clone());
        }
        if asked.as_str() == DENIED_SALT {
            return Err(Denial::ForeignSalt);
        }
        match &self.standing {
            Standing::Stranger => Err(Denial::Stranger),
            Standing::Open if self.rules.is_bound(asked) => Err(Denial::ForeignSalt),
            Standing::Open => Ok(asked.clone()),
            Standing::Tenant(tenant) => {
                let salt = match (asked.as_str(), &tenant.unsalted) {
                    ("", Unsalted::Refuse) => return Err(Denial::Unsalted),
                    ("", Unsalted::Default(salt)) => salt,
                    _ => asked,
                };
                match self.rules.may_use(tenant, salt) {
                    true => Ok(salt.clone()),
                    false => Err(Denial::ForeignSalt),
                }
            }
        }
    }

    /// The salt of what it may not have.
    #[must_use]
    pub fn denied_salt(&self) -> CacheSalt {
        self.denied.clone()
    }

    /// Whether it may see, and clear, objects under the salt.
    #[must_use]
    pub fn owns(&self, salt: &CacheSalt) -> bool {
        match &self.standing {
            Standing::Stranger => false,
            Standing::Open => !self.rules.is_bound(salt),
            Standing::Tenant(tenant) => self.rules.may_use(tenant, salt),
        }
    }

    /// Whether its workers are given the shared segment, in which they can read everything.
    #[must_use]
    pub fn may_share_memory(&self) -> bool {
        match &self.standing {
            Standing::Open => true,
            Standing::Tenant(tenant) => tenant.shared_memory,
            Standing::Stranger => false,
        }
    }
}

fn denied_salt() -> CacheSalt {
    // The text keeps the rule of salts, which a test checks.
    CacheSalt::parse(DENIED_SALT).unwrap_or_default()
}

/// What a connection was found to be, kept with it.
#[derive(Debug)]
struct Found {
    caller: RwLock<(u64, Arc<Caller>)>,
    seat: Seat,
}

impl Found {
    fn of(peer: &Peer) -> Option<&Self> {
        peer.context(|| Self {
            caller: RwLock::new((0, Arc::new(Caller::internal()))),
            seat: Seat::new(peer.id()),
        })
    }
}

/// The rules in force, and what was denied under them.
#[derive(Debug)]
pub struct Tenancy {
    rules: RwLock<Arc<Rules>>,
    /// Counts reloads, so that connections know when what was found of them is out of date.
    generation: AtomicU64,
    /// Whether there is anybody to share with, or a rate to keep.
    shared: AtomicBool,
    shares: Shares,
    large: LargeRequests,
    copies: LargeRequests,
    meter: Meter,
    audit: Audit,
}

impl Tenancy {
    /// Rules in force from the start, on a server with so many threads for requests.
    #[must_use]
    pub fn new(rules: Arc<Rules>, threads: usize) -> Self {
        Self {
            shared: AtomicBool::new(rules.share()),
            shares: Shares::new(threads),
            large: LargeRequests::new(threads),
            copies: LargeRequests::new(threads.clamp(COPIES.0, COPIES.1)),
            meter: Meter::default(),
            rules: RwLock::new(rules),
            generation: AtomicU64::new(1),
            audit: Audit::default(),
        }
    }

    /// The rules in force.
    #[must_use]
    pub fn rules(&self) -> Arc<Rules> {
        Arc::clone(&self.rules.read())
    }

    /// Puts other rules in force. Connections that are open go on under them; what their
    /// requests hold already they keep.
    pub fn replace(&self, rules: Arc<Rules>) {
        self.shared.store(rules.share(), Ordering::Relaxed);
        let stays = |realm: &Realm| realm.name().is_empty() || rules.tenant(realm.name()).is_some();
        self.shares.retain(stays);
        let mut current = self.rules.write();
        *current = rules;
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// What was denied, and its log.
    #[must_use]
    pub fn audit(&self) -> &Audit {
        &self.audit
    }

    /// Forgets what was counted of a tenant that is gone.
    pub fn forget(&self, name: &str) {
        self.audit.forget(name);
        self.shares.retain(|realm| realm.name() != name);
    }

    /// Large requests that wait for their turn.
    #[must_use]
    pub fn large(&self) -> &LargeRequests {
        &self.large
    }

    /// Requests for which the server copies KV itself. A line of their own, because each holds a
    /// chunk in memory and takes as long as an engine's memory lets it.
    #[must_use]
    pub fn copies(&self) -> &LargeRequests {
        &self.copies
    }

    /// What tenants use.
    #[must_use]
    pub fn meter(&self) -> &Meter {
        &self.meter
    }

    /// The sums of the tenant that objects under a salt belong to.
    #[must_use]
    pub fn sums(&self, salt: &CacheSalt) -> Arc<Sums> {
        let rules = self.rules.read();
        let name = rules.owner(salt).map_or(EVERYBODY_ELSE, |it| &it.name);
        self.meter.of(name)
    }

    /// What tenants' connections went through for others' sake.
    #[must_use]
    pub fn share_use(&self) -> Vec<ShareUse> {
        self.shares.usage()
    }

    /// Whether the peer's connection may work, and how much; as
    /// [`Handler::poll_turn`](stockade_transport::Handler::poll_turn).
    pub fn poll_turn(&self, peer: &Peer, cx: &mut Context<'_>) -> Poll<Turn> {
        if !self.shared.load(Ordering::Relaxed) {
            return Poll::Ready(Turn::UNLIMITED);
        }
        let caller = self.caller(peer);
        match Found::of(peer) {
            Some(found) => {
                let realm = caller.realm();
                let turn = self
                    .shares
                    .poll_turn(&found.seat, realm, caller.share(), cx);
                turn.map(|turn| Turn {
                    in_flight_bytes: self.in_flight_bytes(realm),
                    ..turn
                })
            }
            None => Poll::Ready(Turn::UNLIMITED),
        }
    }

    /// What a connection may have in flight for its next message to be read: nothing, if its
    /// tenant has its part of the memory for requests, and others may want theirs.
    fn in_flight_bytes(&self, realm: &Realm) -> usize {
        let held = self.large.held_bytes(realm) + self.copies.held_bytes(realm);
        if held < large::part_of_each(usize::MAX) {
            return usize::MAX;
        }
        match self.shares.company(realm) {
            0 => usize::MAX,
            others if held < large::part_of_each(others + 1) => usize::MAX,
            _ => 0,
        }
    }

    /// The peer's turn is over; as
    /// [`Handler::turn_over`](stockade_transport::Handler::turn_over).
    pub fn turn_over(&self, peer: &Peer, used: Turn, wants_more: bool) {
        if let Some(found) = Found::of(peer).filter(|found| found.seat.has_turn()) {
            let share = found.caller.read().1.share();
            let wants_more = wants_more && self.shared.load(Ordering::Relaxed);
            self.shares.turn_over(&found.seat, used, share, wants_more);
        }
    }

    /// Whether another tenant's requests are here now, or were a moment ago.
    #[must_use]
    pub fn has_company(&self, realm: &Realm) -> bool {
        self.shared.load(Ordering::Relaxed) && self.shares.company(realm) > 0
    }

    /// The peer's connection is gone.
    pub fn gone(&self, peer: &Peer) {
        if let Some(found) = Found::of(peer) {
            self.shares.ended(&found.seat);
        }
    }

    /// Whether the peer's message at hand is to be refused, because its tenant is over its rate.
    #[must_use]
    pub fn is_over_rate(&self, peer: &Peer) -> bool {
        self.shared.load(Ordering::Relaxed)
            && Found::of(peer).is_some_and(|found| found.seat.is_refusing())
    }

    /// Whose connections are told of objects under the salt.
    #[must_use]
    pub fn realm_of(&self, salt: &CacheSalt) -> Realm {
        let rules = self.rules.read();
        match rules.owner(salt) {
            Some(tenant) if !tenant.binding.is_empty() => Realm(Arc::clone(&tenant.name)),
            _ => Realm::open(),
        }
    }

    /// Who the peer is under the rules in force.
    #[must_use]
    pub fn caller(&self, peer: &Peer) -> Arc<Caller> {
        let Some(Found { caller: found, .. }) = Found::of(peer) else {
            // Nobody else keeps things with connections.
            return Arc::new(Caller::new(Standing::Stranger, self.rules(), ""));
        };
        let generation = self.generation.load(Ordering::Acquire);
        {
            let known = found.read();
            if known.0 == generation {
                return Arc::clone(&known.1);
            }
        }
        let rules = self.rules();
        let user = peer.principal().map(|principal| principal.name());
        let standing = rules.standing(peer.listener(), user, peer.credentials());
        let caller = Arc::new(Caller::new(standing, rules, &described(peer)));
        *found.write() = (generation, Arc::clone(&caller));
        caller
    }
}

/// What is known of a connection, in words for the audit log.
fn described(peer: &Peer) -> String {
    let mut text = format!("{} through listener {}", peer.address(), peer.listener());
    if let Some(principal) = peer.principal() {
        text.push_str(&format!(" as user {}", principal.name()));
    }
    if let Some(Credentials { pid, uid, gid }) = peer.credentials() {
        text.push_str(&format!(" with uid {uid} gid {gid}"));
        if let Some(pid) = pid {
            text.push_str(&format!(" pid {pid}"));
        }
    }
    text
}

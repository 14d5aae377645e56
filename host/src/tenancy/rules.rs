//! Whose connection it is: the tenants' bindings, checked as a whole.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use stockade_cache::CacheSalt;
use stockade_transport::Credentials;

use super::{Realm, Share, Standing};

/// What requests without a salt get on a tenant's connections.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unsalted {
    /// Nothing.
    Refuse,
    /// The objects of this salt.
    Default(CacheSalt),
}

/// Which connections are a tenant's.
///
/// Of those that come through its listeners, all, or those of its users and local processes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Binding {
    /// Names of listeners; empty for all of them.
    pub listeners: BTreeSet<String>,
    /// Users of PLAIN and CURVE listeners.
    pub users: BTreeSet<String>,
    /// Users of local processes.
    pub uids: BTreeSet<u32>,
    /// Primary groups of local processes.
    pub gids: BTreeSet<u32>,
}

/// How closely a binding describes a connection; the closest one wins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Closeness {
    Listener,
    Group,
    User,
    Principal,
}

impl Binding {
    /// Whether it binds nothing: the tenant is one by its salts alone.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.listeners.is_empty() && !self.names_peers()
    }

    fn names_peers(&self) -> bool {
        !(self.users.is_empty() && self.uids.is_empty() && self.gids.is_empty())
    }

    fn covers(&self, listener: &str) -> bool {
        self.listeners.is_empty() || self.listeners.contains(listener)
    }

    fn matches(
        &self,
        listener: &str,
        user: Option<&str>,
        credentials: Option<Credentials>,
    ) -> Option<Closeness> {
        if self.is_empty() || !self.covers(listener) {
            return None;
        }
        if !self.names_peers() {
            return Some(Closeness::Listener);
        }
        if user.is_some_and(|user| self.users.contains(user)) {
            return Some(Closeness::Principal);
        }
        let Credentials { uid, gid, .. } = credentials?;
        if self.uids.contains(&uid) {
            return Some(Closeness::User);
        }
        self.gids.contains(&gid).then_some(Closeness::Group)
    }

    /// What makes some connection equally one's own and the other's, if anything does.
    fn conflict(&self, other: &Self) -> Option<String> {
        if self.is_empty() || other.is_empty() {
            return None;
        }
        let shared: Vec<&String> = match (self.listeners.is_empty(), other.listeners.is_empty()) {
            (true, true) => Vec::new(),
            (true, false) => other.listeners.iter().collect(),
            (false, true) => self.listeners.iter().collect(),
            (false, false) => {
                let shared: Vec<_> = self.listeners.intersection(&other.listeners).collect();
                if shared.is_empty() {
                    return None;
                }
                shared
            }
        };
        if !self.names_peers() && !other.names_peers() {
            return shared.first().map(|name| format!("listener {name}"));
        }
        let user = self.users.intersection(&other.users).next();
        let uid = self.uids.intersection(&other.uids).next();
        let gid = self.gids.intersection(&other.gids).next();
        user.map(|user| format!("user {user}"))
            .or_else(|| uid.map(|uid| format!("uid {uid}")))
            .or_else(|| gid.map(|gid| format!("gid {gid}")))
    }
}

/// What `request_configs` may ask for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HintRules {
    /// The longest `lmcache.ttl`; also that of objects without one.
    pub max_ttl: Option<Duration>,
    /// Whether `lmcache.skip_save` is not heard.
    pub always_save: bool,
    /// How long `lmcache.pin` keeps objects; zero for not at all.
    pub max_pin: Duration,
    /// Names of `lmcache.tag.` that are metered.
    pub tags: BTreeSet<String>,
}

/// What holds for one tenant beside its budget.
#[derive(Debug, Clone, PartialEq)]
pub struct TenantRules {
    /// Its name.
    pub name: Arc<str>,
    /// Its salts; `None` for the tenant of all that no other names.
    pub salts: Option<HashSet<CacheSalt>>,
    /// Which connections are its own.
    pub binding: Binding,
    /// What requests without a salt get on those.
    pub unsalted: Unsalted,
    /// Whether its workers are given the shared segment.
    pub shared_memory: bool,
    /// What it gets of the server's time.
    pub share: Share,
    /// What its requests may ask for beside the usual.
    pub hints: HintRules,
    /// Plugins that are its own, by name.
    pub plugins: BTreeSet<String>,
}

/// All tenants' rules, found to hold together.
#[derive(Debug, Default)]
pub struct Rules {
    tenants: Vec<Arc<TenantRules>>,
    /// Which tenant, by number, names a salt.
    owners: HashMap<CacheSalt, usize>,
    /// Listeners that tenants name.
    claimed: HashSet<String>,
    /// What requests may ask for that are no tenant's.
    usual: HintRules,
    #[cfg(debug_assertions)]
    unchecked: bool,
}

impl Rules {
    /// Checks tenants against each other and the listeners that there are.
    ///
    /// # Errors
    /// One sentence that names the tenants and the key.
    pub fn new(tenants: Vec<TenantRules>, listeners: &[&str]) -> Result<Self, String> {
        let mut rules = Self::default();
        // Debug builds only: it is how a test sees that the self-test sees what it is for.
        #[cfg(debug_assertions)]
        {
            rules.unchecked = std::env::var_os("STOCKADE_TEST_NO_SALT_CHECK").is_some();
        }
        for tenant in tenants {
            let name = &tenant.name;
            for listener in &tenant.binding.listeners {
                if !listeners.contains(&listener.as_str()) {
                    return Err(format!(
                        "tenants.{name}.listeners: there is no listener {listener:?}; there are {}",
                        listeners.join(", ")
                    ));
                }
                rules.claimed.insert(listener.clone());
            }
            for other in &rules.tenants {
                if let Some(both) = tenant.binding.conflict(&other.binding) {
                    return Err(format!(
                        "tenants.{name}: {both} is tenant {}'s too, so nobody could tell whose connection it is; name it in one of them",
                        other.name
                    ));
                }
            }
            if let Some((plugin, other)) = tenant
                .plugins
                .iter()
                .find_map(|plugin| Some((plugin, rules.owner_of_plugin(plugin)?)))
            {
                return Err(format!(
                    "tenants.{name}.plugins: {plugin:?} is tenant {}'s already; name it in one of them",
                    other.name
                ));
            }
            for salt in tenant.salts.iter().flatten() {
                if let Some(&other) = rules.owners.get(salt)
                    && let Some(other) = rules.tenants.get(other)
                {
                    return Err(format!(
                        "tenants.{name}.salts: {salt:?} is tenant {}'s already; name it in one of them",
                        other.name,
                        salt = salt.as_str()
                    ));
                }
                rules.owners.insert(salt.clone(), rules.tenants.len());
            }
            rules.tenants.push(Arc::new(tenant));
        }
        for tenant in &rules.tenants {
            if let Unsalted::Default(salt) = &tenant.unsalted
                && !tenant.binding.is_empty()
                && !rules.may_use(tenant, salt)
            {
                return Err(format!(
                    "tenants.{}.default_salt: {:?} is not one of its salts; add it to them, name another, or set unsalted = \"refuse\"",
                    tenant.name,
                    salt.as_str()
                ));
            }
        }
        Ok(rules)
    }

    /// Whether a test has taken the check of salts out.
    #[cfg(debug_assertions)]
    pub(super) fn is_unchecked(&self) -> bool {
        self.unchecked
    }

    /// All tenants, in the order of their names.
    #[must_use]
    pub fn tenants(&self) -> &[Arc<TenantRules>] {
        &self.tenants
    }

    /// The tenant of that name.
    #[must_use]
    pub fn tenant(&self, name: &str) -> Option<&Arc<TenantRules>> {
        self.tenants.iter().find(|tenant| *tenant.name == *name)
    }

    /// The realm of a tenant's connections; `None` if it has none.
    #[must_use]
    pub fn realm(&self, name: &str) -> Option<Realm> {
        let tenant = self.tenant(name)?;
        (!tenant.binding.is_empty()).then(|| Realm(Arc::clone(&tenant.name)))
    }

    /// Whether any tenant is bound to connections.
    #[must_use]
    pub fn bind(&self) -> bool {
        self.tenants.iter().any(|tenant| !tenant.binding.is_empty())
    }

    /// Listeners through which anybody reaches all salts that are not bound, though tenants are
    /// bound to others.
    #[must_use]
    pub fn open_listeners<'l>(&self, listeners: &[&'l str]) -> Vec<&'l str> {
        let is_open = |name: &&&str| self.bind() && !self.claimed.contains(**name);
        listeners.iter().filter(is_open).copied().collect()
    }

    /// What connections get that no tenant is bound to, all together: the share of the tenant of
    /// all other salts.
    #[must_use]
    pub fn open_share(&self) -> Share {
        let rest = self.tenants.iter().find(|it| it.salts.is_none());
        rest.map_or_else(Share::default, |rest| rest.share)
    }

    /// The tenant that has a plugin.
    #[must_use]
    pub fn owner_of_plugin(&self, plugin: &str) -> Option<&Arc<TenantRules>> {
        self.tenants.iter().find(|it| it.plugins.contains(plugin))
    }

    /// What requests for a salt may ask for.
    #[must_use]
    pub fn hints(&self, salt: &CacheSalt) -> &HintRules {
        self.owner(salt).map_or(&self.usual, |tenant| &tenant.hints)
    }

    /// Whether connections share the server's time by tenant.
    #[must_use]
    pub fn share(&self) -> bool {
        self.bind() || self.open_share().rate.is_some()
    }

    /// Whose a connection is.
    #[must_use]
    pub fn standing(
        &self,
        listener: &str,
        user: Option<&str>,
        credentials: Option<Credentials>,
    ) -> Standing {
        let found = self.tenants.iter().filter_map(|tenant| {
            let closeness = tenant.binding.matches(listener, user, credentials)?;
            // One that names the listener describes it closer than one that takes all.
            let is_named = !tenant.binding.listeners.is_empty();
            Some(((closeness, is_named), tenant))
        });
        match found.max_by_key(|(closeness, _)| *closeness) {
            Some((_, tenant)) => Standing::Tenant(Arc::clone(tenant)),
            None if self.claimed.contains(listener) => Standing::Stranger,
            None => Standing::Open,
        }
    }

    /// Whether a salt can be used by the connections of one tenant only.
    #[must_use]
    pub fn is_bound(&self, salt: &CacheSalt) -> bool {
        self.owner(salt)
            .is_some_and(|tenant| !tenant.binding.is_empty())
    }

    /// Whether a tenant's connections may use a salt.
    #[must_use]
    pub fn may_use(&self, tenant: &TenantRules, salt: &CacheSalt) -> bool {
        match &tenant.salts {
            Some(salts) => salts.contains(salt),
            None => !self.owners.contains_key(salt),
        }
    }

    /// The tenant that objects under a salt belong to.
    #[must_use]
    pub fn owner(&self, salt: &CacheSalt) -> Option<&Arc<TenantRules>> {
        match self.owners.get(salt) {
            Some(&at) => self.tenants.get(at),
            None => self.tenants.iter().find(|tenant| tenant.salts.is_none()),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
    use proptest::prelude::*;

    use super::*;
    use crate::tenancy::{Caller, DENIED_SALT, Denial};

    fn salt(text: &str) -> CacheSalt {
        CacheSalt::parse(text).unwrap()
    }

    fn tenant(name: &str, salts: &[&str], binding: Binding) -> TenantRules {
        let salts: Vec<_> = salts.iter().map(|text| salt(text)).collect();
        TenantRules {
            name: Arc::from(name),
            unsalted: Unsalted::Default(salts.first().cloned().unwrap_or_default()),
            salts: (!salts.is_empty()).then(|| salts.into_iter().collect()),
            binding,
            shared_memory: true,
            share: Share::default(),
            hints: HintRules::default(),
            plugins: BTreeSet::new(),
        }
    }

    fn names<const N: usize>(names: [&str; N]) -> BTreeSet<String> {
        names.map(str::to_owned).into()
    }

    fn through(listeners: &[&str]) -> Binding {
        Binding {
            listeners: listeners.iter().map(|&name| name.to_owned()).collect(),
            ..Binding::default()
        }
    }

    const LISTENERS: [&str; 3] = ["default", "a", "b"];

    fn name_of(standing: &Standing) -> &str {
        match standing {
            Standing::Open => "open",
            Standing::Tenant(tenant) => &tenant.name,
            Standing::Stranger => "stranger",
        }
    }

    #[test]
    fn a_connection_is_the_one_of_the_binding_that_describes_it_most_closely() {
        let rules = Rules::new(
            vec![
                tenant("door", &["d"], through(&["a"])),
                tenant(
                    "group",
                    &["g"],
                    Binding {
                        gids: [50].into(),
                        ..through(&["a"])
                    },
                ),
                tenant(
                    "process",
                    &["p"],
                    Binding {
                        uids: [7].into(),
                        ..Binding::default()
                    },
                ),
                tenant(
                    "user",
                    &["u"],
                    Binding {
                        users: names(["ann"]),
                        ..through(&["a", "b"])
                    },
                ),
            ],
            &LISTENERS,
        )
        .unwrap();
        let process = |uid, gid| {
            Some(Credentials {
                pid: None,
                uid,
                gid,
            })
        };
        for (listener, user, credentials, expected) in [
            ("default", None, None, "open"),
            ("default", Some("ann"), None, "open"),
            ("default", None, process(7, 1), "process"),
            ("a", None, None, "door"),
            ("a", Some("bob"), process(1, 50), "group"),
            ("a", None, process(7, 50), "process"),
            ("a", Some("ann"), process(7, 50), "user"),
            ("b", None, None, "stranger"),
            ("b", Some("bob"), process(1, 50), "stranger"),
            ("b", Some("ann"), None, "user"),
        ] {
            let standing = rules.standing(listener, user, credentials);
            assert_eq!(
                name_of(&standing),
                expected,
                "{listener} {user:?} {credentials:?}"
            );
        }
        assert_eq!(rules.open_listeners(&LISTENERS), ["default"]);
    }

    #[test]
    fn rules_that_leave_open_whose_a_connection_or_a_salt_is_are_refused_by_name() {
        let user = |name| Binding {
            users: names([name]),
            ..through(&["a"])
        };
        for (tenants, reason) in [
            (
                vec![tenant("x", &["1"], through(&["nowhere"]))],
                "there is no listener \"nowhere\"",
            ),
            (
                vec![
                    tenant("x", &["1"], through(&["a", "b"])),
                    tenant("y", &["2"], through(&["b"])),
                ],
                "tenants.y: listener b is tenant x's too",
            ),
            (
                vec![
                    tenant("x", &["1"], user("ann")),
                    tenant("y", &["2"], user("ann")),
                ],
                "user ann",
            ),
            (
                vec![
                    tenant("x", &["1"], through(&["a"])),
                    tenant("y", &["1"], through(&["b"])),
                ],
                "tenants.y.salts: \"1\" is tenant x's already",
            ),
            (
                vec![TenantRules {
                    unsalted: Unsalted::Default(salt("other")),
                    ..tenant("x", &["1"], through(&["a"]))
                }],
                "default_salt",
            ),
        ] {
            let error = Rules::new(tenants, &LISTENERS).unwrap_err();
            assert!(error.contains(reason), "{error}");
        }
        let fine = vec![
            tenant("x", &["1"], user("ann")),
            tenant("y", &["2"], user("bob")),
        ];
        assert!(Rules::new(fine, &LISTENERS).is_ok());
    }

    #[test]
    fn what_a_salt_becomes_depends_on_who_sends_it() {
        let refusing = TenantRules {
            unsalted: Unsalted::Refuse,
            ..tenant("strict", &["s"], through(&["b"]))
        };
        let rules = Rules::new(
            vec![
                tenant("bound", &["x", "y"], through(&["a"])),
                refusing,
                tenant("by-salt", &["z"], Binding::default()),
            ],
            &LISTENERS,
        )
        .unwrap();
        let rules = Arc::new(rules);
        let by = |listener: &str, text: &str| {
            let standing = rules.standing(listener, None, None);
            Caller::new(standing, Arc::clone(&rules), "").salt(&salt(text))
        };
        assert_eq!(by("a", ""), Ok(salt("x")));
        assert_eq!(by("a", "y"), Ok(salt("y")));
        for foreign in ["s", "z", "nobody's", DENIED_SALT] {
            assert_eq!(by("a", foreign), Err(Denial::ForeignSalt), "{foreign}");
        }
        assert_eq!(by("b", ""), Err(Denial::Unsalted));
        assert_eq!(by("b", "s"), Ok(salt("s")));
        for open in ["", "z", "nobody's"] {
            assert_eq!(by("default", open), Ok(salt(open)));
        }
        for bound in ["x", "y", "s", DENIED_SALT] {
            assert_eq!(by("default", bound), Err(Denial::ForeignSalt), "{bound}");
        }
    }

    proptest! {
        /// Whatever the bindings, no salt is within reach of two different tenants' connections,
        /// or of a tenant's and an open one, once its tenant is bound.
        #[test]
        fn no_two_callers_of_different_realms_share_a_bound_salt(
            bindings in prop::collection::vec((0..8_u8, 0..4_u8), 1..5),
            asked in "[a-e]?",
        ) {
            let tenants = bindings.iter().enumerate().map(|(at, &(doors, uid))| {
                let listeners = LISTENERS.iter().enumerate()
                    .filter(|(bit, _)| doors & 1 << bit != 0)
                    .map(|(_, name)| (*name).to_owned())
                    .collect();
                let uids = (uid > 0).then_some(u32::from(uid)).into_iter().collect();
                let name = char::from(b'a' + at as u8).to_string();
                let binding = Binding { listeners, uids, ..Binding::default() };
                tenant(&name, &[&name], binding)
            }).collect();
            let Ok(rules) = Rules::new(tenants, &LISTENERS) else { return Ok(()) };
            let rules = Arc::new(rules);
            let asked = salt(&asked);
            let mut reached = HashMap::new();
            for listener in LISTENERS {
                for uid in 0..5 {
                    let credentials = Credentials { pid: None, uid, gid: 0 };
                    let standing = rules.standing(listener, None, Some(credentials));
                    let caller = Caller::new(standing, Arc::clone(&rules), "");
                    if let Ok(salt) = caller.salt(&asked) && rules.is_bound(&salt) {
                        let realm = reached.entry(salt).or_insert_with(|| caller.realm().clone());
                        prop_assert_eq!(&*realm, caller.realm());
                    }
                }
            }
        }
    }
}

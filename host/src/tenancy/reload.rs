//! Tenants of a file that changed, put in force while the server runs.

use std::sync::Arc;

use crate::{budgets::TenantBudgets, config::Config, service::Service};

/// Reads the tenants of the configuration file again, and puts them in force.
pub struct TenantFile {
    config: Config,
    service: Arc<Service>,
}

impl TenantFile {
    /// The tenants that `service` was started with.
    #[must_use]
    pub fn new(config: Config, service: Arc<Service>) -> Self {
        Self { config, service }
    }

    /// Whether there is a file to read.
    #[must_use]
    pub fn exists(&self) -> bool {
        self.config.file.is_some()
    }

    /// Reads the file and puts its tenants in force, all or none; returns how many there are.
    /// Blocks for as long as reading takes.
    ///
    /// # Errors
    /// One sentence that names the key and the way out. Everything stays as it was then.
    pub fn reload(&self, budgets: &TenantBudgets) -> Result<usize, String> {
        let (tenants, rules) = self
            .config
            .reread_tenants()
            .map_err(|error| error.to_string())?;
        let tenancy = self.service.tenancy();
        let count = tenants.len();
        // Who may have what first: a salt that goes to another tenant must not be used by the
        // old one while it counts for the new one.
        let before = tenancy.rules();
        tenancy.replace(Arc::new(rules));
        if let Err(error) = budgets.reconfigure(self.service.engine(), tenants) {
            tenancy.replace(before);
            return Err(format!("tenants: {error}"));
        }
        tracing::info!(count, "tenants were read again");
        Ok(count)
    }
}

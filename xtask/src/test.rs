pub fn all(_filter: Option<&str>) -> anyhow::Result<()> {
    Ok(())
}

pub fn show() -> anyhow::Result<()> {
    Ok(())
}

"""What has been computed: a store of stages, found again by what they depend on."""

def get_x0_from_noise(sample, model_output, alphas_cumprod, timestep):
    power = alphas_cumprod[timestep].reshape(-1, 1, 1, 1)
    return (sample - (1 - power) ** 0.5 * model_output) / power**0.5
